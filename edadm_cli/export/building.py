"""Builds an export: the pipeline with packed weights, its check, its times, its verdict and its model card."""

from __future__ import annotations

import torch

from edadm_cli.artifacts import (
    Artifact,
    Build,
    CallTime,
    ExportFacts,
    FusedLora,
    RunFolder,
)
from edadm_cli.artifacts.quantization import load_plan
from edadm_cli.config import ExportConfig
from edadm_cli.errors import EdadmError
from edadm_cli.export.card import CARD_FILE, CardFacts, model_card
from edadm_cli.export.fusing import LoraFile
from edadm_cli.export.round_trip import compare_loaded, write_reconstruction
from edadm_cli.export.timing import (
    SMALLEST,
    memory_to_time,
    require_memory_to_time,
    speed_sentences,
    time_calls,
)
from edadm_cli.export.verdict import layers_by_width, verdict
from edadm_cli.models.collected import CollectedRun
from edadm_cli.models.loading import resolve_device
from edadm_cli.progress import Reporter
from edadm_cli.quant.plan import joined


def build_export(config: ExportConfig, run: RunFolder, source: Artifact, build: Build, reporter: Reporter) -> Artifact:
    """Packs the denoisers, writes the pipeline, loads it again, and compares its images; commits the artifact.

    Args:
        config: The configuration.
        run: The run.
        source: The reconstruction that is exported.
        build: The artifact that is written.
        reporter: It reports the progress and the warnings.

    Raises:
        InputError: The model is not the one that the reconstruction was made from.
        EdadmError: The export computes other images than the reconstruction.
    """
    collected, device = CollectedRun.open(run), resolve_device(config.device)
    with reporter.task("export", 5) as advance:
        before = write_reconstruction(config, run, source, build.path, reporter, advance)
        after = compare_loaded(config, run, source, build.path, before, reporter, advance)
        measured, sentences = _measured(config, run, build, before.num_parameters, before.half_bytes, device)
        advance(1)
    layers = joined({place: load_plan(source.within(place)) for place in collected.places})
    facts = ExportFacts(
        denoiser=after.denoisers[0],
        further_denoisers=after.denoisers[1:],
        size_mib=after.sizes,
        parity=after.parity,
        layers_by_width=layers_by_width(layers),
        verdict=(*verdict(after.images, layers), *sentences),
        lora=tuple(FusedLora(file=file.path.name, **file.identity()) for file in map(LoraFile.parse, config.lora)),
        pipeline=after.pipeline,
        text_encoders=after.encoders,
        call_time=measured,
    )
    facts.save(build.path)
    card = model_card(CardFacts.of_run(run, source, build.path, facts))
    (build.path / CARD_FILE).write_text(card, encoding="utf-8")
    return build.commit(environment={"device": str(device)})


def _measured(
    config: ExportConfig, run: RunFolder, build: Build, num_parameters: int, half_bytes: int, device: torch.device
) -> tuple[CallTime | None, list[str]]:
    """Returns the times of a few calls, and what the verdict says of them."""
    if not config.measure or num_parameters < SMALLEST:
        return None, []
    try:
        require_memory_to_time(memory_to_time(num_parameters, half_bytes, device), device)
        measured = time_calls(run, build.path, device)
    except EdadmError as error:
        return None, [f"The speed was not measured: {error.message}"]
    return measured, speed_sentences(measured)
