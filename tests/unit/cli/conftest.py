"""Stand-ins for the stages: each builds a small artifact in a moment; the command line is tested alone."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edadm_cli.artifacts import (
    Artifact,
    BuildSpec,
    CollectRecord,
    Coverage,
    Distance,
    Estimate,
    EvaluateRecord,
    ExportRecord,
    Loss,
    Metric,
    ModelRef,
    Parity,
    ReconstructRecord,
    RunFolder,
    SampleRecord,
    SelectRecord,
    StageRecord,
    save_json,
)
from edadm_cli.progress import Reporter

PARENTS = {
    "collect": None,
    "select": "collect",
    "reconstruct": "select",
    "export": "reconstruct",
    "evaluate": "export",
    "sample": "export",
}
WITH_BITS = ("reconstruct", "export")
ACCURACY = 0.97
PEAKS_MIB = dict(zip(PARENTS, (100.0, 200.0, 1e6, 300.0, 400.0, 500.0), strict=True))


@dataclass
class FakeStages:
    """What the fake stages were called with, and what they are to do instead of their work."""

    calls: list[tuple[str, Any, RunFolder]] = field(default_factory=list)
    behaviour: dict[str, Callable[[Reporter], None]] = field(default_factory=dict)

    def config(self, stage: str) -> Any:
        """The configuration of the last call of a stage."""
        return [config for name, config, _ in self.calls if name == stage][-1]

    def run(self, stage: str) -> Path:
        """The run folder of the last call of a stage."""
        return [run.root for name, _, run in self.calls if name == stage][-1]


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeStages:
    """Replaces the stages by stand-ins, in an empty working folder."""
    fakes = FakeStages()
    for name in PARENTS:
        stage = SimpleNamespace(
            run=_make_run(fakes, name),
            build_spec=_build_spec_of(name),
            artifact_name=_name_of,
            finished=_finished_by(_build_spec_of(name)),
        )
        _install(monkeypatch, name, stage)
        _install_estimate(monkeypatch, name, _estimate_of(name))
    _install(monkeypatch, "report", SimpleNamespace(run=_write_report))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EDADM_RUN", raising=False)
    return fakes


def _install(monkeypatch: pytest.MonkeyPatch, name: str, stage: Any) -> None:
    monkeypatch.setitem(sys.modules, f"edadm_cli.{name}.stage", stage)
    monkeypatch.setattr(importlib.import_module(f"edadm_cli.{name}"), "stage", stage, raising=False)


def _install_estimate(monkeypatch: pytest.MonkeyPatch, name: str, estimate: Callable[..., Estimate]) -> None:
    monkeypatch.setitem(sys.modules, f"edadm_cli.estimates.{name}", SimpleNamespace(estimate=estimate))


def _name_of(config: Any) -> str | None:
    return getattr(config, "name", str(config.bits)) if hasattr(config, "bits") else None


def _make_run(fakes: FakeStages, kind: str) -> Callable[..., StageRecord]:
    def run(config: Any, run: RunFolder, *, force: bool = False, reporter: Reporter) -> StageRecord:
        fakes.calls.append((kind, config, run))
        print("a library prints this")
        if kind in fakes.behaviour:
            fakes.behaviour[kind](reporter)
        spec = _build_spec_of(kind)(config, run)
        name = spec.name
        with run.build(spec, force) as build:
            status = "up_to_date" if build.up_to_date else "done"
            if not build.up_to_date:
                save_json(build.path / "data.json", {"kind": kind})
                build.commit()
        shared = {
            "status": status,
            "run": str(run.root),
            "artifact": str(run.path(kind, name)),
            "identity": spec.identity,
            "seconds": 0.5,
            "peak_memory_mib": PEAKS_MIB[kind],
            "warnings": tuple(reporter.warnings),
        }
        return _record(kind, config, shared)

    return run


def _build_spec_of(kind: str) -> Callable[[Any, RunFolder], BuildSpec]:
    def build_spec(config: Any, run: RunFolder) -> BuildSpec:
        name = _name_of(config)
        above = PARENTS[kind]
        parents = () if above is None else (run.open(above, str(config.bits) if above in WITH_BITS else None),)
        model = ModelRef(id="tiny", fingerprint="f")
        return BuildSpec(kind, name, config.identity_fields(), config.seed, parents, model)

    return build_spec


def _finished_by(build_spec: Callable[[Any, RunFolder], BuildSpec]) -> Callable[[Any, RunFolder], Artifact | None]:
    return lambda config, run: run.finished(build_spec(config, run))


def _record(kind: str, config: Any, shared: dict[str, Any]) -> StageRecord:
    bits = str(getattr(config, "bits", ""))
    accuracy = {"prompt_accuracy": Metric(value=ACCURACY, features="digits", num_images=10)}
    own: dict[str, Callable[[], StageRecord]] = {
        "collect": lambda: CollectRecord(**shared, model=config.model, num_steps=20, num_trajectories=8),
        "select": lambda: SelectRecord(
            **shared, strategy=config.strategy, counts=(3, 5), density_radius=None, variety_weight=None
        ),
        "reconstruct": lambda: ReconstructRecord(
            **shared,
            bits=bits,
            recipe=config.recipe.name,
            units=3,
            coverage=Coverage(planned=4, quantized=4, kept=1),
            loss=Loss(first=1.0, last=0.5),
        ),
        "export": lambda: ExportRecord(
            **shared,
            bits=bits,
            size_mib={"unet": 1.0, "denoiser_fp32": 8.0, "ratio": 8.0},
            parity=Parity(images_bit_equal=True, latent_max_abs=0.0),
            verdict=("Layers: 4 in W4A8.",),
        ),
        "evaluate": lambda: EvaluateRecord(
            **shared,
            bits=bits,
            metrics=accuracy,
            distance_to_full_precision=Distance.model_construct(psnr_db=31.0, latent_rel_l2=float("nan")),
            full_precision=accuracy,
            verdict=("No image is black.",),
        ),
        "sample": lambda: SampleRecord(**shared, images=("0.png",)),
    }
    return own[kind]()


def _estimate_of(kind: str) -> Callable[[Any, RunFolder], Estimate]:
    def estimate(config: Any, run: RunFolder) -> Estimate:
        above = PARENTS[kind]
        if above is not None:
            run.open(above, str(config.bits) if above in WITH_BITS else None)
        return Estimate(seconds=2.0, memory_mib=100.0, disk_mib=3.0)

    return estimate


def _write_report(run: RunFolder, bits: list[str] | None) -> Path:
    page = run.root / "report.html"
    page.write_text(f"<p>{bits}</p>")
    return page
