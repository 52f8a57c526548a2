"""`edadm push`: uploads an export with its model card to the Hugging Face hub, as one commit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edadm_cli.artifacts import Evaluation
from edadm_cli.artifacts.inspection import run_of_artifact
from edadm_cli.errors import InputError, UsageError
from edadm_cli.export.card import CARD_FILE, GRID_FILE, CardFacts, model_card
from edadm_cli.export.card_file import card_facts, evaluation_of
from edadm_cli.export.hub_errors import explain_hub_error
from edadm_cli.models.sources.hub import looks_like_hub_id

_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Upload:
    """The content of an upload.

    Attributes:
        repository: `owner/name`.
        files: Maps a name in the repository to a file.
        facts: The content of the card.
    """

    repository: str
    files: dict[str, Path]
    facts: CardFacts

    def card(self, base_license: str | None) -> str:
        """Returns the model card."""
        return model_card(self.facts, self.repository, base_license, has_grid=GRID_FILE in self.files)

    def sizes(self) -> dict[str, int]:
        """Returns the size of each file in bytes; the card is counted without a licence."""
        sizes = {name: path.stat().st_size for name, path in self.files.items()}
        return {CARD_FILE: len(self.card(None).encode()), **sizes}


def prepare(folder: Path, repository: str) -> Upload:
    """Checks an export and collects the files of the upload, the card, and the image grid of its evaluation.

    The manifest is not uploaded, because it describes the machine that made the export.

    Raises:
        UsageError: The repository is not named `owner/name`.
        InputError: The folder is not an export of a run, or it is broken.
    """
    _require_name(repository)
    run, kind, bits = run_of_artifact(folder)
    if run is None or kind != "export" or bits is None:
        raise InputError(
            f"edadm push expects an export inside its run, such as runs/digits-sd/export/w4a8; {folder} is not one.",
            hint="edadm inspect",
        )
    export = run.open("export", bits)
    evaluation = evaluation_of(run, export, bits)
    written_anew = (CARD_FILE, GRID_FILE)
    files = {entry.path: export.file(entry.path) for entry in export.manifest.payload if entry.path not in written_anew}
    if evaluation is not None:
        files[GRID_FILE] = evaluation.file(Evaluation.load(evaluation).grid)
    return Upload(repository, files, card_facts(run, export, bits, evaluation))


def push(upload: Upload, private: bool) -> str:
    """Uploads everything in one commit, and returns its address.

    Raises:
        InputError: Nobody is logged in, the hub cannot be reached, or it refuses the upload.
        MachineError: A file of the export cannot be read.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    try:
        api.whoami()  # asks for the login once, before any file is read
        base_license = _license_of(upload.facts.base_repository)
        api.create_repo(upload.repository, private=private, exist_ok=True)
        operations = [CommitOperationAdd(name, path) for name, path in upload.files.items()]
        operations.append(CommitOperationAdd(CARD_FILE, upload.card(base_license).encode()))
        commit = api.create_commit(
            upload.repository, operations, commit_message=f"Export in {upload.facts.bits.upper()} by edadm"
        )
    except Exception as error:
        raise explain_hub_error(error, upload.repository) from error
    return str(commit.commit_url)


def _require_name(repository: str) -> None:
    """Raises a `UsageError` for a name that the hub would refuse, before anything is sent."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    expected = f"edadm push expects a repository as owner/name; got '{repository}'"
    if not looks_like_hub_id(repository):
        raise UsageError(f"{expected}.", hint="edadm push FOLDER OWNER/NAME --dry-run")
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UsageError(
            f"{expected}: names on the hub have at most 96 letters, digits, '-', '_' and '.', do not begin or end with"
            " '-' or '.', and hold neither '--' nor '..' nor '.git' at their end."
        ) from error


def _license_of(repository: str | None) -> str | None:
    """Returns the licence that the base model's card on the hub names; `None` if the hub shows no such card."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    if repository is None:
        return None
    try:
        card = HfApi().model_info(repository, timeout=_TIMEOUT_S).card_data
    except RepositoryNotFoundError:  # it was withdrawn or made private since, which does not concern the upload
        return None
    licence = getattr(card, "license", None)
    return licence if isinstance(licence, str) else None
