"""Keeps the model card of an export up to date: once it is evaluated, the card has metrics and an image grid."""

from __future__ import annotations

from edadm_cli.artifacts import Artifact, Evaluation, ExportFacts, RunFolder, open_artifact, replace_files
from edadm_cli.export.card import CARD_FILE, GRID_FILE, CardFacts, model_card


def update_card(run: RunFolder, bits: str) -> None:
    """Writes the card of an export anew if its evaluation has something to add.

    Args:
        run: The run.
        bits: The export's name.

    Raises:
        InputError: Another process uses the export, or one of the artifacts is broken.
    """
    export = run.open("export", bits)
    evaluation = evaluation_of(run, export, bits)
    if evaluation is None:
        return
    card = model_card(card_facts(run, export, bits, evaluation), has_grid=True).encode()
    grid = evaluation.file(Evaluation.load(evaluation).grid).read_bytes()
    contents = {CARD_FILE: card, GRID_FILE: grid}
    listed = {entry.path for entry in export.manifest.payload}
    if not contents.keys() <= listed or any((export.path / name).read_bytes() != contents[name] for name in contents):
        replace_files(export, contents)


def card_facts(run: RunFolder, export: Artifact, bits: str, evaluation: Artifact | None) -> CardFacts:
    """Returns the content of the card of a finished export.

    Args:
        run: The run.
        export: The export.
        bits: The export's name.
        evaluation: The evaluation of the export; `None` if there is none.
    """
    metrics = None if evaluation is None else Evaluation.load(evaluation)
    return CardFacts.of_run(run, run.open("reconstruct", bits), export.path, ExportFacts.load(export), metrics)


def evaluation_of(run: RunFolder, export: Artifact, bits: str) -> Artifact | None:
    """Returns the evaluation of exactly this export; `None` where there is none."""
    if not run.has("evaluate", bits):
        return None
    artifact = open_artifact(run.path("evaluate", bits), "evaluate")
    is_of_it = any(parent.identity == export.identity for parent in artifact.manifest.parents)
    return artifact if is_of_it else None
