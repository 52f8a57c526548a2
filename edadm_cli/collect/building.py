"""Loads the model of a collection, samples its trajectories, and writes what calibration needs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from edadm_cli.artifacts import Build
from edadm_cli.collect.recorder import BatchRecorder
from edadm_cli.collect.shards import is_written, merge_parts, require_mergeable, scratch_names, write_shard
from edadm_cli.collect.task import Choices, decided, with_images
from edadm_cli.config import CollectConfig
from edadm_cli.errors import InputError, UsageError
from edadm_cli.models.architecture import Architecture
from edadm_cli.models.collected import Sampling, SchedulerFacts
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.models.loading import load_model, resolve_device
from edadm_cli.models.pipeline_calls.encoding import encode_first
from edadm_cli.models.pipeline_calls.output_size import with_sizes
from edadm_cli.models.pipeline_calls.parameters import takes_guidance, takes_prompts
from edadm_cli.models.pipeline_calls.prompts import require_prompts
from edadm_cli.models.pipeline_calls.sampling import Samples, require_num_steps, sample
from edadm_cli.models.pipeline_calls.seeds import image_seed
from edadm_cli.models.placement import described, not_readable_from_disk, placement
from edadm_cli.models.sources.from_folder import first_sentence
from edadm_cli.models.sources.full_precision import require_full_precision
from edadm_cli.models.sources.locating import Location
from edadm_cli.models.sources.stored_denoiser import weight_bytes
from edadm_cli.processes import Processes
from edadm_cli.progress import Reporter


@dataclass(frozen=True)
class Task(Choices):
    """The choices of a collection with the pipeline that samples it.

    Attributes:
        model: The pipeline in full precision.
        remarks: Sentences for the user, such as where the weights are.
    """

    model: LoadedModel
    remarks: tuple[str, ...] = ()

    @property
    def num_shards(self) -> int:
        """The number of batches of trajectories."""
        return -(-self.num_trajectories // self.batch_size)

    def seeds(self, shard: int) -> list[int]:
        """Returns the seed of each trajectory of a shard."""
        start = shard * self.batch_size
        stop = min(start + self.batch_size, self.num_trajectories)
        return [image_seed(self.config.seed, index) for index in range(start, stop)]

    def sample(self, shard: int) -> Samples:
        """Samples the trajectories of one shard."""
        seeds, first = self.seeds(shard), shard * self.batch_size
        return sample(
            self.model,
            seeds=seeds,
            prompts=None if self.prompts is None else self.prompts[first : first + len(seeds)],
            num_steps=self.num_steps,
            guidance_scale=self.guidance_scale,
        )


def load_task(config: CollectConfig, processes: Processes, given: list[str] | None, location: Location) -> Task:
    """Loads the model, and checks that it has what the configuration asks for.

    Args:
        config: The configuration.
        processes: The processes that share the work.
        given: The prompts of the user's file; `None` if there is no file.
        location: Where the model's files are.
    """
    model, remarks = _load(config, location, resolve_device(processes.device_name(config.device)))
    model.entry = with_images(model.entry, config)
    if sizes := config.sizes():
        model.entry = with_sizes(model, sizes)
    if config.guidance_scale is not None:
        _require_guidance(model)
    require_num_steps(model, config.num_steps or model.entry.num_steps)
    if given is not None:
        require_prompts(model)
    choices = decided(config, model.ref, model.entry, given, takes_prompts=takes_prompts(model.pipeline))
    return Task(**vars(choices), model=model, remarks=(*model.remarks, *remarks))


def _load(config: CollectConfig, location: Location, device: torch.device) -> tuple[LoadedModel, tuple[str, ...]]:
    """Returns the model, and a remark on where its weights are, if they are not in memory and the user left that open.

    Raises:
        UsageError: Weights are to be read from disk, and the model's files do not allow that.
    """
    dtype = getattr(torch, config.dtype)
    if not isinstance(location, Architecture):
        require_full_precision(location[0])
    weights = {} if config.weights == "memory" else weight_bytes(location, dtype)
    where = placement(weights, config.weights, device)
    model = load_model(
        config.model, device, dtype, prediction_type=config.prediction_type, placement=where, location=location
    )
    if config.weights == "disk" and model.placement == "memory":
        raise not_readable_from_disk(model.ref.id)
    is_remarkable = config.weights == "auto" and model.placement != "memory"
    return model, (described(where, sum(weights.values()), device),) if is_remarkable else ()


def _require_guidance(model: LoadedModel) -> None:
    """Refuses a scale of guidance for a pipeline that takes none.

    Raises:
        UsageError: The pipeline has no guidance, or a component of it decides the scale.
    """
    if takes_guidance(model.pipeline):
        return
    if getattr(model.pipeline, "guider", None) is not None:
        raise UsageError(
            f"{model.ref.id} guides as its component 'guider' says, so --guidance-scale has no meaning for it.",
            hint="another guidance_scale in guider/guider_config.json of the model's folder",
        )
    raise UsageError(f"{model.ref.id} has no guidance, so --guidance-scale has no meaning for it.")


def collect_trajectories(task: Task, build: Build, processes: Processes, reporter: Reporter) -> None:
    """Samples the shards, each in one of the processes, merges their conditions and features, and commits the artifact.

    A shard that an interrupted collection wrote is not sampled again.

    Args:
        task: What is sampled.
        build: The artifact that is written.
        processes: The processes that share the shards.
        reporter: It reports the progress and the warnings.

    Raises:
        InputError: The calls of the denoiser cannot be recorded or merged, or samples are not finite.
        MachineError: The device ran out of memory.
    """
    places = task.model.by_denoiser().keys()
    shards = _in_order(task, range(processes.index, task.num_shards, processes.count))
    waiting = [shard for shard in shards if not is_written(build.path, shard)]
    encode_first(task.model, [partial(task.sample, shard) for shard in waiting])
    with reporter.task("Sampling trajectories", sum(len(task.seeds(shard)) for shard in shards)) as advance:
        for shard in shards:
            if shard in waiting:
                _sample_shard(task, build.path, shard, reporter)
            for place in places:
                require_mergeable(build.path / place, shards[0], shard)
            processes.check()
            advance(len(task.seeds(shard)))
    processes.wait()
    if processes.is_main:
        for place in places:
            merge_parts(build.path / place, task.num_shards)
        _sampling(task).save(build.path)
        scratch = [name for shard in range(task.num_shards) for name in scratch_names(shard)]
        build.discard(str(Path(place, name)) for place in places for name in scratch)
        device = task.model.pipeline.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        build.commit(environment={"device": name, "processes": processes.count, "weights": task.model.placement})
    processes.wait()


def _in_order(task: Task, shards: Iterable[int]) -> list[int]:
    """Returns the shards in the order in which they are sampled: a smaller last one comes second.

    This shows early whether its calls can be merged with those of the other shards.
    """
    ordered = list(shards)
    if len(ordered) > 2 and len(task.seeds(ordered[-1])) != len(task.seeds(ordered[0])):
        ordered.insert(1, ordered.pop())
    return ordered


def _sample_shard(task: Task, folder: Path, shard: int, reporter: Reporter) -> None:
    """Samples one shard, records the calls of all denoisers, and writes them."""
    seeds = task.seeds(shard)
    first = shard * task.batch_size
    num_features = max(0, min(len(seeds), task.feature_batch - first))
    denoisers = task.model.by_denoiser()
    recorders = {place: BatchRecorder(each, len(seeds), num_features) for place, each in denoisers.items()}
    with ExitStack() as recordings:
        for recorder in recorders.values():
            recordings.enter_context(recorder.recording())
        samples = task.sample(shard)
    _require_calls(task, recorders.values())
    for warning in _warnings(task, list(recorders.values()), samples):
        if warning not in reporter.warnings:
            reporter.warn(warning)
    for place, recorder in reversed(recorders.items()):  # the first denoiser's file says that the shard is done
        (folder / place).mkdir(exist_ok=True)
        write_shard(folder / place, shard, recorder, task.config.dtype)


def _require_calls(task: Task, recorders: Iterable[BatchRecorder]) -> None:
    """Raises an `InputError` where a denoiser of the pipeline was not called: nothing would calibrate it."""
    for recorder in recorders:
        if not recorder.latents:
            raise InputError(
                f"{task.model.ref.id} did not call its denoiser '{recorder.model.denoiser_name}' in {task.num_steps} "
                "steps: its timesteps belong to another denoiser, and nothing calibrates this one.",
                hint=f"--num-steps {task.model.entry.num_steps}",
            )


def _warnings(task: Task, recorders: list[BatchRecorder], samples: Samples) -> list[str]:
    """Returns the warnings of the pipeline, and one if it ignored guidance.

    Raises:
        InputError: `--guidance-scale` asks for guidance, but the denoiser was called without it.
    """
    name = type(task.model.pipeline).__name__
    warnings = [warning for recorder in recorders for warning in recorder.warnings]
    warnings += [f"{name}: {first_sentence(ValueError(text))}" for text in samples.warnings]
    scale = task.guidance_scale
    timesteps = [float(timestep) for recorder in recorders for timestep in recorder.timesteps]
    has_shared_steps = len(recorders) > 1 and len(set(timesteps)) < len(timesteps)  # one denoiser per branch
    if scale is None or scale <= 1 or has_shared_steps or any(recorder.is_guided for recorder in recorders):
        return warnings
    reasons = [text for text in warnings if "guidance" in text.lower()]
    problem = f"{task.model.ref.id} is sampled without guidance, though its scale is {scale:g}"
    problem += f" ({reasons[0]})" if reasons else ""
    if task.config.guidance_scale is not None:
        raise InputError(f"{problem}.", hint="--guidance-scale 1")
    return [f"{problem}.", *(text for text in warnings if text not in reasons)]


def _sampling(task: Task) -> Sampling:
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
        further_denoisers=task.model.further,
    )


def _finite(value: Any) -> Any:
    """Returns a value that JSON can represent: an infinity, as in DPM-Solver's configuration, becomes a text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
