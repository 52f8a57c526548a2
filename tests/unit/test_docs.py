"""The documentation says what is true: commands and options exist, links lead somewhere, keys are real."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import runpy
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from edadm_cli.artifacts import records
from edadm_cli.cli.app import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = {
    "run", "collect", "select", "sensitivity", "reconstruct", "export", "evaluate", "sample", "report", "inspect",
    "models", "bench", "engines", "push",
}  # fmt: skip


@cache
def _options(command: str) -> set[str]:
    """The options that a command's help names."""
    with contextlib.redirect_stdout(io.StringIO()) as text, pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "300")
        assert main([command, "--help"]) == 0
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", text.getvalue()))


def _command_lines(path: Path) -> Iterator[str]:
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)
    for block in blocks if path.suffix == ".md" else [path.read_text(encoding="utf-8")]:
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                command = re.sub(r"^\s*([A-Z_]+=\S*\s+)*", "", part)  # variables may stand before a command
                if command.startswith("edadm ") and not command.startswith("edadm [OPTIONS]"):
                    yield command


@pytest.mark.parametrize("path", [*PAGES, ROOT / "examples/ci-gate.sh"], ids=lambda path: path.name)
def test_commands_in_the_documentation_exist(path: Path) -> None:
    for line in _command_lines(path):
        words = shlex.split(line, comments=True)
        if words[1].startswith("--"):
            continue
        assert words[1] in COMMANDS, line
        used = {word.split("=")[0] for word in words[2:] if re.match(r"--?[a-z]", word)}
        assert used - _options(words[1]) == set(), line


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        *(f"docs/{page}.md" for page in ("results", "results-digits", "results-emoji", "ingredients", "scale")),
    ],
)
def test_tables_of_measurements_are_those_that_the_programs_print(name: str) -> None:
    page = (ROOT / name).read_text(encoding="utf-8")
    assert "<!-- table: " in page
    filled = runpy.run_path(str(ROOT / "benchmarks" / "fill_tables.py"))["filled"]
    assert filled(page) == page, f"python benchmarks/fill_tables.py {name}"


def test_sections_that_messages_name_exist() -> None:
    sources = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "edadm_cli").rglob("*.py"))]
    named = {match for source in sources for match in re.findall(r"docs/([\w-]+\.md), '([^']+)'", source)}
    assert len(named) >= 2
    for page, section in named:
        headings = re.findall(r"^#+ (.*)$", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.M)
        assert section in headings, f"docs/{page} has no section '{section}'"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_python_in_the_documentation_parses_and_imports(path: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S):
        tree = ast.parse(block)
        imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        exec(compile(ast.Module(imports, type_ignores=[]), str(path), "exec"), {})


def test_the_keys_of_every_record_are_documented() -> None:
    page = (ROOT / "docs" / "artifacts.md").read_text(encoding="utf-8")
    kinds = [kind for kind in vars(records).values() if isinstance(kind, type)]
    for kind in kinds:
        if issubclass(kind, records.BaseModel) and kind.__module__ == records.__name__:
            for name in kind.model_fields:
                assert re.search(rf"\b{name}\b", page), f"{kind.__name__}.{name}"


def test_every_command_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^## edadm (\w+)$", page, re.M)) == COMMANDS
    for command in COMMANDS:
        section = page.split(f"## edadm {command}\n")[1].split("\n## ")[0]
        for option in _options(command):
            assert option in section, f"{command} {option}"


def test_the_map_of_the_code_names_all_packages_and_files_that_exist() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for package in (ROOT / "edadm_cli").glob("*/__init__.py"):
        assert f"`edadm_cli/{package.parent.name}`" in page, package.parent.name
    for name in re.findall(r"`([\w/-]+/[\w.-]*)`", page):
        assert (ROOT / name).exists() or (ROOT / "edadm_cli" / name).exists(), name


def test_the_map_of_the_models_package_names_every_module() -> None:
    folder = ROOT / "edadm_cli" / "models"
    modules = {path.stem for path in folder.glob("[a-z]*.py")} | {
        path.parent.name for path in folder.glob("*/__init__.py")
    }
    named = set(re.findall(r"`(\w+)`", str(ast.get_docstring(ast.parse((folder / "__init__.py").read_text())))))
    assert modules == named


def test_files_and_symbols_of_the_method_exist() -> None:
    """`grid.quantize` is defined in a file `grid.py`, `learn.UnitLearner.loss` inside a class in `learn.py`."""
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    sources = {path.stem: path for path in sorted((ROOT / "edadm_cli").glob("*/*.py"))}
    named = set(re.findall(r"`([\w/]+\.py|[a-z_]+(?:\.\w+)+)`", page))
    symbols = {name for name in named if not name.endswith(".py") and not name.startswith(("torch.", "ranges."))}
    assert len(symbols) > 15, "the page lost its symbols, or this test its way of finding them"
    for name in named - symbols:
        if name.endswith(".py"):
            assert (ROOT / name).is_file() or (ROOT / "edadm_cli" / name).is_file(), name
    for name in symbols:
        module, *path = name.split(".")
        body: list[ast.stmt] = ast.parse(sources[module].read_text(encoding="utf-8")).body
        for part in path:
            actual = [node for node in body if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == part]
            assert actual, name
            body = actual[0].body
