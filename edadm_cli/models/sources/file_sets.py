"""The files of a diffusers folder that decide a model, and their hash, without importing a library that computes.

Which files are read follows from the classes of the components, and only the libraries know these: `read_folder` asks
them. `likely_fingerprint` takes the kinds of the components from the names of their classes. It serves to recognize a
folder whose fingerprint is known: where a name misleads, other files are hashed, and the fingerprint is another one.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from edadm_cli.artifacts import explained_os_errors, file_sha256
from edadm_cli.artifacts.files import in_threads
from edadm_cli.errors import EdadmError, InputError, quoted
from edadm_cli.models.shipped import shared_parts
from edadm_cli.models.sources.files import INDEX_NAME, description_files, read_json_object, refuse_code, regular_file
from edadm_cli.models.sources.weights import find_weights

SCHEDULER_CONFIG = "scheduler_config.json"
MODEL_CONFIGS = ("config.json", "generation_config.json")
TRANSFORMERS_STEM, DIFFUSERS_STEM = "model", "diffusion_pytorch_model"
"""Start of the names of the weight files of transformers' and of diffusers' models."""
_WITH_FOLDERS_OF_TEXT = ("Tokenizer", "TokenizerFast", "Processor", "ProcessorFast", "FeatureExtractor")


def fingerprint_of(root: Path, files: Iterable[Path]) -> str:
    """Returns a hash over relative path and content hash of each file.

    Args:
        root: The model's folder; a part that it shares with another model lies beside it.
        files: The files, in any order.
    """
    digest = sha256()
    ordered = sorted(files)
    for path, content in zip(ordered, in_threads(file_sha256, ordered), strict=True):
        name = path.relative_to(root) if path.is_relative_to(root) else path.relative_to(root.parent)
        digest.update(f"{name.as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def component_folder(root: Path, name: str, class_name: str) -> Path:
    """Returns the folder of a component; the older layout has a model and its scheduler side by side in the root.

    Raises:
        InputError: There is no such folder, or it is a link.
    """
    folder = root / name
    with explained_os_errors(folder):
        if not folder.is_dir():
            if not (root / "config.json").is_file() and not (root / SCHEDULER_CONFIG).is_file():
                raise InputError(f"{root} has no folder '{name}', though {INDEX_NAME} names it ({class_name}).")
            return root
        target = folder.resolve()
    if target != folder:
        raise InputError(
            f"{folder} is a link to the folder {target}, and such a link is not followed.",
            hint=f"replace the link by a copy, or copy the model with: {quoted('cp', '-rL', root, 'NEW_FOLDER')}",
        )
    return folder


def likely_fingerprint(path: Path) -> str | None:
    """Returns the fingerprint of a folder if the names of its classes say which files are read; `None` if not.

    Args:
        path: The folder, with its links resolved.
    """
    try:
        index = read_json_object(path / INDEX_NAME)
        named = {name: value for name, value in index.items() if isinstance(value, list) and None not in value}
        is_described = "safety_checker" in named  # pipelines with one are sampled without their feature extractor
        if named.pop("feature_extractor", None) is not None and not is_described:
            return None  # whether images are sampled without it, the class of the pipeline says
        named.pop("safety_checker", None)
        files = {path / INDEX_NAME}
        for name, (library, class_name) in named.items():
            files.update(_likely_files(path, name, library, class_name))
        return fingerprint_of(path, files)
    except (EdadmError, OSError, TypeError, ValueError):  # whoever reads the folder in full says what is wrong
        return None


def _likely_files(root: Path, name: str, library: str, class_name: str) -> tuple[Path, ...]:
    shared = shared_parts(root).get(name)
    folder = component_folder(root, name, class_name) if shared is None else shared
    root = root if shared is None else shared
    refuse_code(folder)
    if class_name.endswith("Scheduler"):
        return (folder / SCHEDULER_CONFIG,)
    if class_name.endswith(_WITH_FOLDERS_OF_TEXT):
        return description_files(root, folder)
    configs = [regular_file(root, folder / file) for file in MODEL_CONFIGS]
    stem = TRANSFORMERS_STEM if library == "transformers" else DIFFUSERS_STEM
    weights = find_weights(root, folder, name, stem)
    return tuple(path for path in (*configs, *weights.files, weights.index) if path is not None)
