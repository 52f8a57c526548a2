"""What a run holds, read once: the page's only source of figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from edadm_cli.artifacts import Artifact, ModelRef, RunFolder
from edadm_cli.config import BitWidth
from edadm_cli.errors import InputError, UsageError

BY_BITS = ("reconstruct", "export", "evaluate")


@dataclass(frozen=True)
class Part:
    """An artifact and its main JSON file."""

    artifact: Artifact
    facts: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        """The settings that it was made with."""
        return self.artifact.manifest.config


@dataclass(frozen=True)
class Width:
    """What a run holds of one bit width; `None` for a stage that was not run."""

    bits: str
    reconstruct: Part | None
    export: Part | None
    evaluate: Part | None

    @property
    def title(self) -> str:
        """The bit width as it is written in papers: W4A8."""
        return self.bits.upper()

    @property
    def recipe(self) -> str | None:
        """Name of the recipe."""
        return None if self.reconstruct is None else str(self.reconstruct.config["recipe"]["name"])


@dataclass(frozen=True)
class RunContents:
    """Everything that the page shows; `None` for a stage that was not run."""

    collect: Part | None
    select: Part | None
    widths: tuple[Width, ...]
    benches: tuple[Part, ...] = ()

    def parts(self) -> Iterator[Part]:
        """Every artifact, in the order of the chain."""
        for part in (self.collect, self.select):
            if part is not None:
                yield part
        for width in self.widths:
            for part in (width.reconstruct, width.export, width.evaluate):
                if part is not None:
                    yield part
        yield from self.benches

    @property
    def model(self) -> ModelRef:
        """The model behind all of it."""
        return next(self.parts()).artifact.manifest.model

    @property
    def name(self) -> str:
        """The model's name, short: of a folder only the last part."""
        path = PurePath(self.model.id)
        return path.name or self.model.id if path.is_absolute() else self.model.id


def read_run(run: RunFolder, bits: Sequence[str] | None) -> RunContents:
    """Read a run, checking each artifact and its descent.

    Args:
        run: The run folder.
        bits: Bit widths to show, in this order; `None` shows all, the widest first.

    Raises:
        InputError: The run holds nothing, or nothing of a bit width that was named; or an artifact is broken
            or was made from something that has changed since.
    """
    held = _widths_held(run)
    shown = held if bits is None else list(dict.fromkeys(bits))
    for name in shown:
        if name not in held:
            run.open("reconstruct", name)  # says what is missing, and with which command it is made
    contents = RunContents(
        collect=_read(run, "collect", None, "sampling.json"),
        select=_read(run, "select", None, "selection.json"),
        widths=tuple(_read_width(run, name) for name in shown),
        benches=_read_benches(run, None if bits is None else shown),
    )
    if next(contents.parts(), None) is None:
        raise InputError(f"The run {run.root} holds no artifact to report on.", hint=run.command("collect"))
    return contents


def _widths_held(run: RunFolder) -> list[str]:
    widths: dict[str, BitWidth] = {}
    for kind in BY_BITS:
        for name in run.names(kind):
            try:
                widths[name] = BitWidth.parse(name)
            except UsageError:
                continue  # evaluate/full-precision is no bit width
    return sorted(widths, key=lambda name: (widths[name].weight, widths[name].activation), reverse=True)


def _read_width(run: RunFolder, bits: str) -> Width:
    return Width(
        bits=bits,
        reconstruct=_read(run, "reconstruct", bits, "units.json"),
        export=_read(run, "export", bits, "export.json"),
        evaluate=_read(run, "evaluate", bits, "evaluation.json"),
    )


def _read_benches(run: RunFolder, shown: Sequence[str] | None) -> tuple[Part, ...]:
    """Benches of the bit widths that are shown; those of a model without an export with them."""
    found = (_read(run, "bench", name, "bench.json") for name in run.names("bench"))
    parts = (part for part in found if part is not None)
    return tuple(part for part in parts if shown is None or set(part.facts["bits"]) & set(shown))


def _read(run: RunFolder, kind: str, name: str | None, file: str) -> Part | None:
    if not run.has(kind, name):
        return None
    artifact = run.open(kind, name)
    return Part(artifact, artifact.json(file))
