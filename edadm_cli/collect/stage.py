"""`edadm collect`: samples at full precision and stores the tensors that calibration needs."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from edadm_cli.artifacts import Build, BuildSpec, CollectRecord, RunFolder, shared_keys
from edadm_cli.collect.recorder import BatchRecorder
from edadm_cli.collect.shards import is_written, merge_parts, require_mergeable, scratch_names, write_shard
from edadm_cli.config import CollectConfig
from edadm_cli.errors import InputError, UsageError
from edadm_cli.models.collected import Sampling, SchedulerFacts
from edadm_cli.models.from_folder import first_sentence
from edadm_cli.models.images import images_sha256
from edadm_cli.models.loading import LoadedModel, load_model, resolve_device
from edadm_cli.models.prompts import prompts_name, resolve_prompts
from edadm_cli.models.sampling import Samples, image_seed, require_num_steps, sample, takes_guidance
from edadm_cli.processes import ALONE, Processes, join
from edadm_cli.progress import Reporter, SilentReporter


def run(
    config: CollectConfig, run_folder: RunFolder, *, force: bool = False, reporter: Reporter | None = None
) -> CollectRecord:
    """Samples `num_trajectories` trajectories and writes the `collect` artifact.

    Raises:
        InputError: The model or the prompt file is not usable, or sampling ends in values that are not
            finite.
        MachineError: The device is missing, its memory does not suffice, or the disk is full.
        UsageError: The configuration asks for something that the model does not have.
    """
    start = time.monotonic()
    reporter = reporter or SilentReporter()
    processes = join(config.device)
    with processes.together():
        task = prepare(config, processes)
        for remark in task.model.remarks:
            reporter.warn(remark)
        with run_folder.build(task.build_spec(), force, processes) as build:
            is_done = build.up_to_date
            if not is_done:
                _collect(task, build, processes, reporter)
            artifact = build.finished()
    return CollectRecord(
        **shared_keys(run_folder.root, artifact, up_to_date=is_done, started=start, warnings=reporter.warnings),
        model=task.model.ref.id,
        num_steps=task.num_steps,
        num_trajectories=task.num_trajectories,
    )


def build_spec(config: CollectConfig, run_folder: RunFolder) -> BuildSpec:
    """Returns the description of the artifact that `run` would build, without sampling."""
    return prepare(config, ALONE).build_spec()


def artifact_name(config: CollectConfig) -> None:
    """Returns `None`: a run has one artifact of this kind."""
    return None


@dataclass(frozen=True)
class _Task:
    """A configuration whose open choices are all decided."""

    config: CollectConfig
    model: LoadedModel
    num_trajectories: int
    num_steps: int
    guidance_scale: float | None
    batch_size: int
    feature_batch: int
    prompts: list[str] | None

    @property
    def num_shards(self) -> int:
        return -(-self.num_trajectories // self.batch_size)

    def seeds(self, shard: int) -> list[int]:
        start = shard * self.batch_size
        stop = min(start + self.batch_size, self.num_trajectories)
        return [image_seed(self.config.seed, index) for index in range(start, stop)]

    def _conditions(self) -> dict[str, Any]:
        """Returns the facts that only some pipelines have; one that is not used is absent and changes no identity."""
        entry, fields = self.model.entry, dict[str, Any]()
        if entry.images is not None:
            fields["images_sha256"] = images_sha256(Path(entry.images))
        if entry.call_arguments:
            fields["call_arguments"] = entry.call_arguments
        return fields

    def build_spec(self) -> BuildSpec:
        entry = self.model.entry
        fields = {
            **self.config.identity_fields(),
            "num_trajectories": self.num_trajectories,
            "num_steps": self.num_steps,
            "guidance_scale": self.guidance_scale,
            "batch_size": self.batch_size,
            "feature_batch": self.feature_batch,
            "eta": entry.eta,
            "pipeline_class": entry.pipeline_class,
            "scheduler_class": entry.scheduler_class,
            "scheduler_config": entry.scheduler_config,
            **self._conditions(),
            "prompts": prompts_name(self.model, self.config.prompts),
            "prompts_sha256": None if self.prompts is None else sha256("\n".join(self.prompts).encode()).hexdigest(),
        }
        return BuildSpec("collect", None, fields, self.config.seed, (), self.model.ref)


def prepare(config: CollectConfig, processes: Processes) -> _Task:
    """Loads the model and decides what the configuration leaves open."""
    device = resolve_device(processes.device_name(config.device))
    model = load_model(config.model, device, getattr(torch, config.dtype), prediction_type=config.prediction_type)
    if config.images is not None:
        model.entry = model.entry.model_copy(update={"images": str(config.images.expanduser().resolve())})
    _require_one_denoiser(model)
    entry = model.entry
    if config.guidance_scale is not None and not takes_guidance(model.pipeline):
        raise UsageError(f"{model.ref.id} has no guidance, so --guidance-scale has no meaning for it.")
    num_trajectories = config.num_trajectories or entry.num_trajectories
    num_steps = config.num_steps or entry.num_steps
    require_num_steps(model, num_steps)
    return _Task(
        config=config,
        model=model,
        num_trajectories=num_trajectories,
        num_steps=num_steps,
        guidance_scale=entry.guidance_scale if config.guidance_scale is None else config.guidance_scale,
        batch_size=min(config.batch_size or entry.batch_size, num_trajectories),
        feature_batch=min(config.feature_batch or entry.feature_batch, num_trajectories),
        prompts=resolve_prompts(model, config.prompts, num_trajectories, config.seed),
    )


def _collect(task: _Task, build: Build, processes: Processes, reporter: Reporter) -> None:
    """Samples the shards, each in one of the processes, and merges their conditions and features."""
    shards = _in_order(task, range(processes.index, task.num_shards, processes.count))
    with reporter.task("Sampling trajectories", sum(len(task.seeds(shard)) for shard in shards)) as advance:
        for shard in shards:
            if not is_written(build.path, shard):
                _sample_shard(task, build.path, shard, reporter)
            require_mergeable(build.path, shards[0], shard)
            processes.check()
            advance(len(task.seeds(shard)))
    processes.wait()
    if processes.is_main:
        merge_parts(build.path, task.num_shards)
        _sampling(task).save(build.path)
        build.discard(name for shard in range(task.num_shards) for name in scratch_names(shard))
        device = task.model.pipeline.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        build.commit(environment={"device": name, "processes": processes.count})
    processes.wait()


def _in_order(task: _Task, shards: Iterable[int]) -> list[int]:
    """Returns the shards in the order in which they are sampled: a smaller last one comes second.

    This shows early whether its calls can be merged with those of the other shards.
    """
    ordered = list(shards)
    if len(ordered) > 2 and len(task.seeds(ordered[-1])) != len(task.seeds(ordered[0])):
        ordered.insert(1, ordered.pop())
    return ordered


def _sample_shard(task: _Task, folder: Path, shard: int, reporter: Reporter) -> None:
    seeds = task.seeds(shard)
    first = shard * task.batch_size
    num_features = max(0, min(len(seeds), task.feature_batch - first))
    recorder = BatchRecorder(task.model, len(seeds), num_features)
    prompts = None if task.prompts is None else task.prompts[first : first + len(seeds)]
    with recorder.recording():
        samples = sample(
            task.model,
            seeds=seeds,
            prompts=prompts,
            num_steps=task.num_steps,
            guidance_scale=task.guidance_scale,
        )
    for warning in _warnings(task, recorder, samples):
        if warning not in reporter.warnings:
            reporter.warn(warning)
    write_shard(folder, shard, recorder, task.config.dtype)


def _require_one_denoiser(model: LoadedModel) -> None:
    """Refuses pipelines whose denoising needs more than one network, since a run holds one denoiser.

    Raises:
        InputError: A second denoiser takes some of the timesteps, or a control network feeds the denoiser.
    """
    components = {name for name, part in model.pipeline.components.items() if isinstance(part, torch.nn.Module)}
    second = f"{model.denoiser_name}_2"
    if second in components:
        raise InputError(
            f"{model.ref.id} has a second denoiser, '{second}', for some of its timesteps, and the artifacts of a run "
            "hold one denoiser: an export would compute the other timesteps at full precision.",
            hint="a model with one denoiser, such as Wan 2.1 or Wan 2.2's TI2V-5B",
        )
    if "controlnet" in components:
        raise InputError(
            f"{model.ref.id} has a control network, which gives its denoiser other inputs at every step, and only "
            "conditions that stay the same over a trajectory can be calibrated.",
            hint="quantize the pipeline without the control network, then give the exported denoiser to the pipeline "
            f"with it: from_pretrained(..., {model.denoiser_name}=...)",
        )


def _warnings(task: _Task, recorder: BatchRecorder, samples: Samples) -> list[str]:
    """Returns the warnings of the pipeline, and one if it ignored guidance.

    Raises:
        InputError: `--guidance-scale` asks for guidance, but the denoiser was called without it.
    """
    name = type(task.model.pipeline).__name__
    warnings = list(recorder.warnings)
    warnings += [f"{name}: {first_sentence(ValueError(text))}" for text in samples.warnings]
    scale = task.guidance_scale
    if scale is None or scale <= 1 or recorder.is_guided:
        return warnings
    reasons = [text for text in warnings if "guidance" in text.lower()]
    problem = f"{task.model.ref.id} is sampled without guidance, though its scale is {scale:g}"
    problem += f" ({reasons[0]})" if reasons else ""
    if task.config.guidance_scale is not None:
        raise InputError(f"{problem}.", hint="--guidance-scale 1")
    return [f"{problem}.", *(text for text in warnings if text not in reasons)]


def _sampling(task: _Task) -> Sampling:
    """Returns how the trajectories were sampled, for later stages to load the model and sample in the same way."""
    scheduler = task.model.pipeline.scheduler
    config = {key: _finite(value) for key, value in scheduler.config.items() if not key.startswith("_")}
    return Sampling(
        model=task.model.ref,
        entry=task.model.entry,
        dtype=task.config.dtype,
        num_steps=task.num_steps,
        guidance_scale=task.guidance_scale,
        eta=task.model.entry.eta,
        scheduler=SchedulerFacts(class_name=type(scheduler).__name__, config=config),
        prompts=None if task.prompts is None else tuple(task.prompts),
        seeds=tuple(seed for shard in range(task.num_shards) for seed in task.seeds(shard)),
    )


def _finite(value: Any) -> Any:
    """Returns a value that JSON can represent: an infinity, as in DPM-Solver's configuration, becomes a text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
