"""`edadm export`: writes a quantized pipeline as a diffusers folder, loads it again and compares the two."""

from __future__ import annotations

import time
from typing import Any

import torch

from edadm_cli.artifacts import (
    Artifact,
    Build,
    BuildSpec,
    CallTime,
    EngineFiles,
    ExportFacts,
    ExportRecord,
    FusedLora,
    Parity,
    RunFolder,
    TextEncoder,
    recipe_name,
    shared_keys,
)
from edadm_cli.artifacts.quantization import load_params, load_plan
from edadm_cli.config import ExportConfig
from edadm_cli.engines.files import FileWriter, engine_artifact, file_engine
from edadm_cli.engines.reference import LAYER_BOUND, layer_parity, use_arithmetic
from edadm_cli.engines.registry import engine as engine_of
from edadm_cli.errors import EdadmError, UsageError
from edadm_cli.export.card import CARD_FILE, CardFacts, model_card
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
from edadm_cli.export.text_encoders import narrow_saved, quantize_text_encoders, recorded_calls, require_package
from edadm_cli.export.timing import (
    SMALLEST,
    memory_to_time,
    require_memory_to_time,
    speed_sentences,
    time_calls,
)
from edadm_cli.export.verdict import layers_by_width, verdict
from edadm_cli.integrations.comfyui.writing import ComfyUiFile
from edadm_cli.integrations.quantizer import METHOD, format_version
from edadm_cli.models.calibration import CalibrationSet
from edadm_cli.models.collected import CollectedRun
from edadm_cli.models.loading import LoadedModel, load_model, resolve_device
from edadm_cli.models.placement import LEARNING_SHARE, memory_of
from edadm_cli.models.sampling import EVALUATION, Samples, image_seed, sample
from edadm_cli.models.stored import bring_stored, total_parameters
from edadm_cli.progress import Reporter, SilentReporter
from edadm_cli.quant.layers import quantized_layers
from edadm_cli.quant.network import load_quant_params, quantize_network, unquantized
from edadm_cli.quant.plan import joined

FLOAT_BYTES = 4
INTEGER_SAMPLING_LIMIT = 120.0  # seconds of sampling in quantize-dequantize; beyond them, integers would take too long


def run(
    config: ExportConfig, run_folder: RunFolder, *, force: bool = False, reporter: Reporter | None = None
) -> ExportRecord:
    """Packs the denoiser, writes the pipeline, loads it with diffusers, and compares its images.

    Raises:
        InputError: There is no reconstruction, or the model is not the one that it was made from.
        EdadmError: The export computes other images than the reconstruction.
    """
    started, reporter = time.monotonic(), reporter or SilentReporter()
    writer = _writer(config)
    if config.text_encoders == "int8":
        require_package()
    spec = build_spec(config, run_folder)
    with run_folder.build(spec, force) as build:
        is_done = build.up_to_date
        artifact = build.artifact or _build(config, run_folder, spec.parents[0], build, reporter)
    files = None if writer is None else _files(run_folder, artifact, writer, reporter, force)
    facts = ExportFacts.load(artifact)
    return ExportRecord(
        **shared_keys(run_folder.root, artifact, up_to_date=is_done, started=started, warnings=reporter.warnings),
        bits=str(config.bits),
        size_mib=facts.size_mib,
        parity=facts.parity,
        layers_by_width=facts.layers_by_width,
        verdict=facts.verdict,
        pipeline=facts.pipeline,
        text_encoders=facts.text_encoders,
        call_time=facts.call_time,
        engine=files,
    )


def build_spec(config: ExportConfig, run_folder: RunFolder) -> BuildSpec:
    """Returns the specification of the artifact that `run` would build, without building it."""
    source = run_folder.open("reconstruct", str(config.bits))
    fields = {**config.identity_fields(), "format_version": format_version(load_plan(source))}
    if config.lora:
        fields["lora"] = [LoraFile.parse(text).identity() for text in config.lora]
    return BuildSpec("export", str(config.bits), fields, config.seed, (source,), source.manifest.model)


def _writer(config: ExportConfig) -> FileWriter | None:
    """Returns the writer of further files of the export, which have an artifact of their own.

    Raises:
        UsageError: Both an engine and a format are named, or the engine has no files.
    """
    if config.format == "comfyui":
        if config.engine is not None:
            raise UsageError("--engine and --format comfyui each write files of their own: ask for one at a time.")
        return ComfyUiFile()
    return None if config.engine is None else file_engine(engine_of(config.engine))


def _files(run: RunFolder, export: Artifact, writer: FileWriter, reporter: Reporter, force: bool) -> EngineFiles:
    """Returns the further files as an artifact, which is written unless it is up to date."""
    artifact = engine_artifact(run, export, writer, reporter, force)
    size = sum(entry.bytes for entry in artifact.manifest.payload) / 2**20
    return EngineFiles(name=writer.name, artifact=str(artifact.path), identity=artifact.identity, size_mib=size)


def finished(config: ExportConfig, run_folder: RunFolder) -> Artifact | None:
    """Returns the export that `run` would reuse; `None` if further files are requested.

    Raises:
        InputError: An export with other settings has the same place, or there is no reconstruction.
    """
    is_empty = not run_folder.names("export")
    has_files = config.engine is not None or config.format != "diffusers"
    return None if has_files or is_empty else run_folder.finished(build_spec(config, run_folder))


def artifact_name(config: ExportConfig) -> str:
    """Returns the artifact's name within its kind."""
    return config.name


def _build(config: ExportConfig, run: RunFolder, source: Artifact, build: Build, reporter: Reporter) -> Artifact:
    collected = CollectedRun.open(run)
    with reporter.task("export", 5) as advance:
        model, num_parameters, fused = quantized_model(config, run, source)
        _warn_of_adapters(fused, reporter)
        before_bytes = HALF_BYTES * num_parameters + bytes_beside_denoisers(model)
        encoders = _quantized_encoders(config, model, collected)
        started = time.monotonic()
        before = sample_images(config, model, collected)
        seconds = time.monotonic() - started
        advance(1)
        configs = {
            each.denoiser_name: _quantization_config(config, source, place)
            for place, each in model.by_denoiser().items()
        }
        for warning in write_pipeline(model, build.path, configs, {*fused.components, *encoders}):
            reporter.warn(warning)
        for name in encoders:
            narrow_saved(build.path / name)
        del model
        advance(1)
        device = resolve_device(config.device)
        loaded = load_model(str(build.path), device, torch.float32, collected.entry)
        _save_memory(loaded, num_parameters, device)
        _require_coverage(loaded, source)
        after = sample_images(config, loaded, collected)
        advance(1)
        errors = _layer_errors(loaded, run.open("select"), device)
        integer = None
        if seconds <= INTEGER_SAMPLING_LIMIT:
            for each in loaded.by_denoiser().values():
                use_arithmetic(each.denoiser, "integer")
            integer = sample_images(config, loaded, collected)
        else:
            reporter.warn(
                f"Sampling took {seconds:.0f} s, and exact integers are several times as slow: they were compared layer"
                " by layer, not by images."
            )
        parity = compare(before, after, integer, errors)
        denoisers = (loaded.denoiser_name, *loaded.further)
        sizes = component_sizes(build.path)
        sizes["denoiser_fp32"] = num_parameters * FLOAT_BYTES / 2**20
        sizes["ratio"] = sizes["denoiser_fp32"] / sum(sizes[name] for name in denoisers)
        encoders = {name: row.model_copy(update={"size_mib": sizes[name]}) for name, row in encoders.items()}
        whole = pipeline_size(sizes, denoisers, encoders, loaded_bytes(loaded), before_bytes)
        del loaded
        advance(1)
        measured, sentences = _measured(config, run, build, num_parameters, before_bytes, device)
        advance(1)
    layers = joined({place: load_plan(source.within(place)) for place in collected.places})
    facts = ExportFacts(
        denoiser=denoisers[0],
        further_denoisers=denoisers[1:],
        size_mib=sizes,
        parity=_parity(parity),
        layers_by_width=layers_by_width(layers),
        verdict=(*verdict(after.images, layers), *sentences),
        lora=tuple(FusedLora(file=file.path.name, **file.identity()) for file in map(LoraFile.parse, config.lora)),
        pipeline=whole,
        text_encoders=encoders,
        call_time=measured,
    )
    facts.save(build.path)
    card = model_card(CardFacts.of_run(run, source, build.path, facts))
    (build.path / CARD_FILE).write_text(card, encoding="utf-8")
    return build.commit(environment={"device": str(device)})


def _quantized_encoders(config: ExportConfig, model: LoadedModel, collected: CollectedRun) -> dict[str, TextEncoder]:
    """Gives text encoders 8-bit weights where that is asked for; their calls come from one step of sampling."""
    if config.text_encoders == "float":
        return {}
    with recorded_calls(model) as calls:
        sample_images(config, model, collected, num_steps=1)
    return quantize_text_encoders(model, calls)


def _measured(
    config: ExportConfig, run: RunFolder, build: Build, num_parameters: int, before_bytes: int, device: torch.device
) -> tuple[CallTime | None, list[str]]:
    """Returns the times of a few calls, and what the verdict says of them."""
    if not config.measure or num_parameters < SMALLEST:
        return None, []
    try:
        require_memory_to_time(memory_to_time(num_parameters, before_bytes), device)
        measured = time_calls(run, build.path, device)
    except EdadmError as error:
        return None, [f"The speed was not measured: {error.message}"]
    return measured, speed_sentences(measured)


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
