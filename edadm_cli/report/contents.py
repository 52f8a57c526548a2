"""Reads the contents of a run, from which the page takes all of its numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Generic, TypeVar

from edadm_cli.artifacts import (
    Artifact,
    BenchResult,
    Evaluation,
    ExportFacts,
    ModelRef,
    Payload,
    RunFolder,
    Selection,
    Sensitivity,
    Units,
    recipe_name,
)
from edadm_cli.config import BitWidth
from edadm_cli.errors import InputError, UsageError
from edadm_cli.models.collected import Sampling

BY_BITS = ("reconstruct", "export", "evaluate")


Facts = TypeVar("Facts", bound=Payload, covariant=True)


@dataclass(frozen=True)
class Part(Generic[Facts]):
    """An artifact and its main JSON file."""

    artifact: Artifact
    facts: Facts

    @property
    def config(self) -> dict[str, Any]:
        """The settings that it was built with."""
        return self.artifact.manifest.config


@dataclass(frozen=True)
class Width:
    """The artifacts of one bit width; `None` for a stage that was not run.

    Attributes:
        evaluate: The evaluation in torch, without a step cache and in the model's own features.
        further: The evaluations on engines, with step caches and in other features, by name.
        unreadable: For each of those that is damaged or of an earlier export, one sentence.
    """

    bits: str
    reconstruct: Part[Units] | None
    export: Part[ExportFacts] | None
    evaluate: Part[Evaluation] | None
    further: tuple[Part[Evaluation], ...] = ()
    unreadable: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The bit width in the notation of papers, such as W4A8."""
        return self.bits.upper()

    @property
    def recipe(self) -> str | None:
        """Name of the recipe."""
        return None if self.reconstruct is None else recipe_name(self.reconstruct.artifact)


@dataclass(frozen=True)
class RunContents:
    """The artifacts that the page shows; `None` for a stage that was not run."""

    collect: Part[Sampling] | None
    select: Part[Selection] | None
    widths: tuple[Width, ...]
    benches: tuple[Part[BenchResult], ...] = ()
    sensitivity: Part[Sensitivity] | None = None

    def parts(self) -> Iterator[Part[Payload]]:
        """Yields every artifact, in the order of the chain."""
        stages: list[Part[Payload] | None] = [self.collect, self.select, self.sensitivity]
        for width in self.widths:
            stages += [width.reconstruct, width.export, width.evaluate, *width.further]
        yield from (part for part in stages if part is not None)
        yield from self.benches

    @property
    def model(self) -> ModelRef:
        """The model that was quantized."""
        return next(self.parts()).artifact.manifest.model

    @property
    def name(self) -> str:
        """The model's short name; for a folder, the last part of its path."""
        path = PurePath(self.model.id)
        return path.name or self.model.id if path.is_absolute() else self.model.id


def read_run(run: RunFolder, bits: Sequence[str] | None) -> RunContents:
    """Reads a run, checking each artifact and its descent.

    Args:
        run: The run folder.
        bits: Bit widths to show, in this order; `None` shows all, the widest first.

    Raises:
        InputError: The run has no artifact, or none of a bit width that was named; or an artifact is broken, or was
            built from something that has changed since.
    """
    available = _available_widths(run)
    shown = available if bits is None else list(dict.fromkeys(bits))
    for name in shown:
        if name not in available:
            run.open("reconstruct", name)  # raises the error that names the missing artifact and its command
    contents = RunContents(
        collect=_read(run, "collect", None, Sampling),
        select=_read(run, "select", None, Selection),
        widths=tuple(_read_width(run, name) for name in shown),
        benches=_read_benches(run, None if bits is None else shown),
        sensitivity=_read(run, "sensitivity", None, Sensitivity),
    )
    if next(contents.parts(), None) is None:
        raise InputError(f"The run {run.root} holds no artifact to report on.", hint=run.command("collect"))
    return contents


def _available_widths(run: RunFolder) -> list[str]:
    widths: dict[str, BitWidth] = {}
    for kind in BY_BITS:
        for name in run.names(kind):
            try:
                widths[name] = BitWidth.parse(name)
            except UsageError:
                continue  # the name has more than a bit width, such as that of an engine
    return sorted(widths, key=lambda name: (widths[name].weight, widths[name].activation), reverse=True)


def _read_width(run: RunFolder, bits: str) -> Width:
    further, unreadable = _read_further(run, bits)
    return Width(
        bits=bits,
        reconstruct=_read(run, "reconstruct", bits, Units),
        export=_read(run, "export", bits, ExportFacts),
        evaluate=_read(run, "evaluate", bits, Evaluation),
        further=further,
        unreadable=unreadable,
    )


def _read_further(run: RunFolder, bits: str) -> tuple[tuple[Part[Evaluation], ...], tuple[str, ...]]:
    """Returns the evaluations whose names have more than the bit width, and sentences on those that cannot be read."""
    parts, problems = [], []
    for name in run.names("evaluate"):
        if not name.startswith(f"{bits}-"):
            continue
        try:
            part = _read(run, "evaluate", name, Evaluation)
        except InputError as error:
            problems.append(f"{error.message} Next: {error.hint}" if error.hint else error.message)
        else:
            parts += [part] if part is not None and part.facts.bits == bits else []
    return tuple(parts), tuple(problems)


def _read_benches(run: RunFolder, shown: Sequence[str] | None) -> tuple[Part[BenchResult], ...]:
    """Returns the benches of the shown bit widths, and those of a model without an export."""
    results = (_read(run, "bench", name, BenchResult) for name in run.names("bench"))
    parts = (part for part in results if part is not None)
    return tuple(part for part in parts if shown is None or set(part.facts.bits) & set(shown))


def _read(run: RunFolder, kind: str, name: str | None, payload: type[Facts]) -> Part[Facts] | None:
    if not run.has(kind, name):
        return None
    artifact = run.open(kind, name)
    return Part(artifact, payload.load(artifact))
