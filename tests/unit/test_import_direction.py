"""Imports point one way and in no circle, a stage never imports another, and the light modules stay light."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "edadm_cli"
KERNELS = ROOT / "kernels"

STAGES = {"collect", "select", "sensitivity", "reconstruct", "export", "evaluate", "sample", "report", "bench"}
MIDDLE = {"metrics", "models", "engines", "artifacts", "calibrate", "integrations"}
GROUND = {
    "bits",
    "config",
    "engine_config",
    "errors",
    "hooks",
    "launching",
    "plain_data",
    "plugins",
    "processes",
    "progress",
    "recipe",
    "stage_config",
    "version",
}
# Which packages a package may import, besides itself.
ALLOWED = {
    "cli": STAGES | MIDDLE | {"quant", "estimates"} | GROUND,
    "library": STAGES | MIDDLE | {"quant"} | GROUND,
    "estimates": STAGES | MIDDLE | {"quant"} | GROUND,
    **{stage: MIDDLE | {"quant"} | GROUND for stage in STAGES},
    **{package: MIDDLE | {"quant"} | GROUND for package in MIDDLE},
    "quant": GROUND,
    **{package: GROUND for package in GROUND},
    "__init__": {"integrations", "library", "version"},
    "__main__": {"cli"},
}
HEAVY = {"torch", "torchvision", "diffusers", "transformers", "numpy", "scipy", "matplotlib", "PIL"}
LIGHT = (
    "cli",
    "artifacts",
    "bits",
    "config",
    "stage_config",
    "engine_config",
    "recipe",
    "errors",
    "launching",
    "library",
    "plain_data",
    "progress",
    "processes",
    "version",
    "__init__",
)


def _sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path, top_level: bool = False) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything a file imports, with the names that are taken from a package.

    With `top_level`, only what runs when the module is imported: neither functions nor `if TYPE_CHECKING`.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    module = _module(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in _run_at_import(tree) if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node.lineno, name.name
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            origin = ".".join(part for part in (base, node.module) if part)
            for name in node.names:
                yield node.lineno, f"{origin}.{name.name}"


def _run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        is_type_checking = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
        if not is_function and not is_type_checking:
            yield child
            yield from _run_at_import(child)


def _package_of(dotted: str) -> str | None:
    parts = dotted.split(".")
    if parts[0] != "edadm_cli":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in ALLOWED else "__init__"


def _violations(path: Path) -> list[str]:
    importer = _package_of(_module(path)) or "__init__"
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for line, name in _imports(path)
        if (package := _package_of(name)) is not None and package != importer and package not in ALLOWED[importer]
    ]


def test_every_package_has_a_rule() -> None:
    packages = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert packages - ALLOWED.keys() == set()


def test_every_folder_with_code_is_a_package() -> None:
    """Else it would be missing where the package is installed."""
    folders = {path.parent for path in _sources(PACKAGE)}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_imports_point_one_way() -> None:
    assert [line for path in _sources(PACKAGE) for line in _violations(path)] == []


def _module_graph() -> dict[str, set[str]]:
    """What each module imports of the package's modules, anywhere in its text."""
    files = {_module(path): path for path in _sources(PACKAGE)}
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        parents = ((name, name.rpartition(".")[0]) for _, name in _imports(path))
        targets = {name if name in files else parent for name, parent in parents}
        graph[module] = {target for target in targets if target in files and target != module}
    return graph


def _cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules each of which leads to every other one."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        pending, reached[start] = [start], set()
        while pending:
            for target in graph[pending.pop()] - reached[start]:
                reached[start].add(target)
                pending.append(target)
    groups = {tuple(sorted(other for other in reached[one] if one in reached[other])) for one in graph}
    return [list(group) for group in sorted(groups) if group]


def test_modules_do_not_import_each_other_in_cycles() -> None:
    assert _cycles(_module_graph()) == []


def test_the_search_for_cycles_finds_them() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"a"}}
    assert _cycles(graph) == [["b", "c"]]


def test_light_modules_import_nothing_heavy_when_they_are_imported() -> None:
    heavy = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in _sources(PACKAGE)
        if _package_of(_module(path)) in LIGHT
        for line, name in _imports(path, top_level=True)
        if name.split(".")[0] in HEAVY
    ]
    assert heavy == []


def test_kernels_import_nothing_of_the_command_line() -> None:
    if not KERNELS.is_dir():
        pytest.skip("there are no kernels yet")
    names = [name for path in _sources(KERNELS) for _, name in _imports(path)]
    assert [name for name in names if name.startswith("edadm_cli")] == []
    assert not (KERNELS / "__init__.py").exists()


@pytest.mark.parametrize(
    ("package", "text", "is_wrong"),
    [
        ("select", "from edadm_cli.collect import stage", True),
        ("select", "from edadm_cli import collect", True),
        ("select", "from ..collect.stage import run", True),
        ("select", "import edadm_cli.cli.app", True),
        ("select", "def f():\n    from edadm_cli.reconstruct import stage", True),
        ("select", "from edadm_cli.artifacts import BuildSpec\nfrom edadm_cli.quant import grid", False),
        ("select", "from . import tdac\nfrom .tdac import density", False),
        ("quant", "from edadm_cli.models import units", True),
        ("quant", "from edadm_cli.errors import InputError\nimport torch", False),
        ("models", "from edadm_cli.collect import stage", True),
        ("models", "from edadm_cli.artifacts import ModelRef", False),
        ("cli", "from edadm_cli.collect import stage", False),
    ],
)
def test_the_rule_itself_tells_right_from_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str, text: str, is_wrong: bool
) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "edadm_cli" / package / "module.py"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert bool(_violations(path)) == is_wrong
