"""Writes the pipeline of a reconstruction as a folder, loads it again, and compares the two.

Only one of the two pipelines is in memory at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edadm_cli.artifacts import Artifact, Parity, PipelineSize, RunFolder, TextEncoder, recipe_name
from edadm_cli.artifacts.quantization import load_params, load_plan
from edadm_cli.config import ExportConfig
from edadm_cli.engines.reference import LAYER_BOUND, layer_parity, use_arithmetic
from edadm_cli.errors import EdadmError
from edadm_cli.export.folder import write_pipeline
from edadm_cli.export.fusing import Fused, LoraFile, fuse, refit
from edadm_cli.export.parity import ExportParity, compare
from edadm_cli.export.sizes import (
    HALF_BYTES,
    bytes_beside_denoisers,
    component_sizes,
    loaded_bytes,
    pipeline_size,
)
from edadm_cli.export.text_encoders import narrow_saved, quantize_text_encoders, recorded_calls
from edadm_cli.integrations.quantizer import METHOD
from edadm_cli.models.collected import CollectedRun
from edadm_cli.models.denoiser_calls.calibration import CalibrationSet
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.models.loading import load_model, resolve_device
from edadm_cli.models.pipeline_calls.sampling import Samples, sample
from edadm_cli.models.pipeline_calls.seeds import EVALUATION, image_seed
from edadm_cli.models.placement import LEARNING_SHARE, memory_of
from edadm_cli.models.repeatable import repeatable_convolutions
from edadm_cli.models.stored import bring_stored, total_parameters
from edadm_cli.progress import Reporter
from edadm_cli.quant.layers import quantized_layers
from edadm_cli.quant.network import load_quant_params, quantize_network, unquantized
from edadm_cli.quant.plan import format_version

FLOAT_BYTES = 4
INTEGER_SAMPLING_LIMIT = 120.0  # seconds of sampling in quantize-dequantize; beyond them, integers would take too long


@dataclass(frozen=True)
class Before:
    """What is known of the pipeline before it is written.

    Attributes:
        samples: Images of the reconstruction.
        seconds: The time that it took to sample them.
        num_parameters: The number of weights of the denoisers.
        half_bytes: The bytes of the full-precision pipeline's weights in float16.
        encoders: The text encoders with 8-bit weights, by name.
    """

    samples: Samples
    seconds: float
    num_parameters: int
    half_bytes: int
    encoders: dict[str, TextEncoder]


@dataclass(frozen=True)
class After:
    """What is known of the pipeline that was loaded from its files.

    Attributes:
        parity: The comparison with the reconstruction.
        images: The images that were compared, 8-bit levels `(N, C, H, W)`.
        denoisers: The names of the components that are quantized.
        sizes: The sizes of components on disk in MiB, and that of the denoisers in float32.
        pipeline: The size of the whole pipeline.
        encoders: The text encoders with 8-bit weights, by name.
    """

    parity: Parity
    images: Tensor
    denoisers: tuple[str, ...]
    sizes: dict[str, float]
    pipeline: PipelineSize
    encoders: dict[str, TextEncoder]


def write_reconstruction(
    config: ExportConfig,
    run: RunFolder,
    source: Artifact,
    folder: Path,
    reporter: Reporter,
    advance: Callable[[int], None],
) -> Before:
    """Samples images of the reconstruction, and writes its pipeline into `folder`.

    Args:
        config: The configuration of the export.
        run: The run.
        source: The reconstruction.
        folder: The folder of the exported pipeline.
        reporter: It reports the warnings.
        advance: Progress callback, called after sampling and after writing.

    Raises:
        InputError: The model has changed, or an adapter does not belong to it.
        MachineError: The device ran out of memory, or the disk is full.
    """
    collected = CollectedRun.open(run)
    model, num_parameters, fused = quantized_model(config, run, source)
    _warn_of_adapters(fused, reporter)
    half_bytes = HALF_BYTES * num_parameters + bytes_beside_denoisers(model)
    encoders = _quantized_encoders(config, model, collected)
    started = time.monotonic()
    samples = sample_images(config, model, collected)
    seconds = time.monotonic() - started
    advance(1)
    configs = {
        each.denoiser_name: _quantization_config(config, source, place) for place, each in model.by_denoiser().items()
    }
    for warning in write_pipeline(model, folder, configs, {*fused.components, *encoders}):
        reporter.warn(warning)
    for name in encoders:
        narrow_saved(folder / name)
    advance(1)
    return Before(samples, seconds, num_parameters, half_bytes, encoders)


def compare_loaded(
    config: ExportConfig,
    run: RunFolder,
    source: Artifact,
    folder: Path,
    before: Before,
    reporter: Reporter,
    advance: Callable[[int], None],
) -> After:
    """Loads the pipeline from `folder`, and compares it with the reconstruction.

    Args:
        config: The configuration of the export.
        run: The run.
        source: The reconstruction.
        folder: The folder of the exported pipeline.
        before: The result of `write_reconstruction`.
        reporter: It reports the warnings.
        advance: Progress callback, called after sampling and after the comparison.

    Raises:
        EdadmError: It computes other images than the reconstruction.
    """
    collected, device = CollectedRun.open(run), resolve_device(config.device)
    loaded = load_model(str(folder), device, torch.float32, collected.entry)
    _save_memory(loaded, before.num_parameters, device)
    _require_coverage(loaded, source)
    after = sample_images(config, loaded, collected)
    advance(1)
    errors = _layer_errors(loaded, run.open("select"), device)
    integer = None
    if before.seconds <= INTEGER_SAMPLING_LIMIT:
        for each in loaded.by_denoiser().values():
            use_arithmetic(each.denoiser, "integer")
        integer = sample_images(config, loaded, collected)
    else:
        reporter.warn(
            f"Sampling took {before.seconds:.0f} s, and exact integers are several times as slow: they were compared"
            " layer by layer, not by images."
        )
    parity = compare(before.samples, after, integer, errors)
    denoisers = (loaded.denoiser_name, *loaded.further)
    sizes = component_sizes(folder)
    sizes["denoiser_fp32"] = before.num_parameters * FLOAT_BYTES / 2**20
    sizes["ratio"] = sizes["denoiser_fp32"] / sum(sizes[name] for name in denoisers)
    encoders = {name: row.model_copy(update={"size_mib": sizes[name]}) for name, row in before.encoders.items()}
    whole = pipeline_size(sizes, denoisers, encoders, loaded_bytes(loaded), before.half_bytes)
    advance(1)
    return After(_parity(parity), after.images, denoisers, sizes, whole, encoders)


def _quantized_encoders(config: ExportConfig, model: LoadedModel, collected: CollectedRun) -> dict[str, TextEncoder]:
    """Gives text encoders 8-bit weights where that is asked for; their calls come from one step of sampling."""
    if config.text_encoders == "float":
        return {}
    with recorded_calls(model) as calls:
        sample_images(config, model, collected, num_steps=1)
    return quantize_text_encoders(model, calls)


def quantized_model(config: ExportConfig, run: RunFolder, source: Artifact) -> tuple[LoadedModel, int, Fused]:
    """Returns the pipeline with the reconstruction's parameters, its number of weights, and the fused LoRA.

    Float weights are not in memory, unless a LoRA is fused into them: codes take their place layer by layer.
    """
    device, adapters = resolve_device(config.device), [LoraFile.parse(text) for text in config.lora]
    model = CollectedRun.open(run).load(device, torch.float32, "memory" if adapters else "disk")
    denoisers = {place: each.denoiser for place, each in model.by_denoiser().items()}
    num_parameters = sum(total_parameters(denoiser) for denoiser in denoisers.values())
    fused = fuse(model, adapters)
    for place, denoiser in denoisers.items():
        part = source.within(place)
        layers, params = load_plan(part), load_params(part)
        if fused.before:
            params = refit(denoiser, layers, params, fused)
        quantize_network(denoiser, layers, device=device)
        load_quant_params(denoiser, params)
        bring_stored(denoiser)
    _save_memory(model, num_parameters, device)
    return model, num_parameters, fused


def _save_memory(model: LoadedModel, num_parameters: int, device: torch.device) -> None:
    """Has the layers of large denoisers dequantize their weights in every call instead of once for all."""
    if num_parameters * FLOAT_BYTES <= LEARNING_SHARE * memory_of(device):
        return
    for each in model.by_denoiser().values():
        for layer in quantized_layers(each.denoiser).values():
            layer.keeps_float_weight = False


def _layer_errors(loaded: LoadedModel, selection: Artifact, device: torch.device) -> dict[str, float]:
    """Returns the error of each layer in integers; names of a further denoiser's layers begin with the component."""
    errors = {}
    for place, each in loaded.by_denoiser().items():
        call = CalibrationSet.load(selection.within(place)).call(range(1), device, torch.float32)
        names = layer_parity(each.denoiser, *call)
        errors.update({f"{place}.{name}" if place else name: error for name, error in names.items()})
    return errors


def _warn_of_adapters(fused: Fused, reporter: Reporter) -> None:
    if fused.before or fused.components:
        reporter.warn(
            f"The LoRA changed {fused.changed_codes:.1%} of the codes of its layers. Ranges are those without it, and"
            " edadm evaluate compares with full precision without it."
        )


def _require_coverage(loaded: LoadedModel, source: Artifact) -> None:
    missing = [
        name
        for place, each in loaded.by_denoiser().items()
        for name in unquantized(each.denoiser, load_plan(source.within(place)))
    ]
    if missing:
        raise EdadmError(f"{len(missing)} planned layers are not quantized in the export: {', '.join(missing)}.")


def sample_images(
    config: ExportConfig, model: LoadedModel, collected: CollectedRun, num_steps: int | None = None
) -> Samples:
    """Samples the images that are compared, with `num_steps` steps or as many as were collected."""
    count, prompts = config.parity_samples, collected.prompts
    with repeatable_convolutions():  # the comparison is exact
        return sample(
            model,
            seeds=[image_seed(config.seed, index, EVALUATION) for index in range(count)],
            prompts=None if prompts is None else [prompts[index % len(prompts)] for index in range(count)],
            num_steps=num_steps or collected.num_steps,
            guidance_scale=collected.guidance_scale,
        )


def _parity(parity: ExportParity) -> Parity:
    return Parity(
        images_bit_equal=parity.images_bit_equal,
        latent_max_abs=parity.latent_max_abs,
        integer_rel_l2=parity.integer_rel_l2,
        integer_bound=LAYER_BOUND,
        integer_layer=parity.integer_layer,
        integer_latent_rel_l2=parity.integer_latent_rel_l2,
    )


def _quantization_config(config: ExportConfig, source: Artifact, place: str) -> dict[str, Any]:
    plan = load_plan(source.within(place))
    return {
        "quant_method": METHOD,
        "format_version": format_version(plan),
        "bits": str(config.bits),
        "recipe": recipe_name(source),
        "plan": plan.model_dump(mode="json", exclude_none=True),
    }
