"""Decides the open choices of a collection, which are its identity, and recognizes one that is up to date.

Nothing here imports a library that computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from edadm_cli.artifacts import Artifact, BuildSpec, ModelRef, RunFolder
from edadm_cli.artifacts.manifest import environment_facts, read_manifest
from edadm_cli.config import CollectConfig
from edadm_cli.errors import EdadmError
from edadm_cli.models.architecture import WEIGHTS_VERSION, load_architecture
from edadm_cli.models.collected import Sampling
from edadm_cli.models.pipeline_calls.images import images_sha256
from edadm_cli.models.pipeline_calls.output_size import entry_with_sizes
from edadm_cli.models.pipeline_calls.prompts import prompts_name, prompts_of, read_prompts
from edadm_cli.models.registry import ModelEntry, known_models
from edadm_cli.models.sources.file_sets import likely_fingerprint
from edadm_cli.models.sources.locating import files_of, is_random
from edadm_cli.version import __version__


@dataclass(frozen=True)
class Choices:
    """A configuration whose open choices are all decided.

    Attributes:
        config: The configuration.
        ref: The model's identity.
        entry: The model's defaults, with the sizes and the images of the configuration.
        num_trajectories: N, the number of trajectories.
        num_steps: T, the number of sampler steps of each trajectory.
        guidance_scale: The scale of guidance; `None` for a pipeline without guidance.
        batch_size: The number of trajectories that are sampled together, which are one shard.
        feature_batch: B, the number of trajectories whose mid-block features are recorded.
        prompts: One prompt per trajectory; `None` for a pipeline without prompts.
    """

    config: CollectConfig
    ref: ModelRef
    entry: ModelEntry
    num_trajectories: int
    num_steps: int
    guidance_scale: float | None
    batch_size: int
    feature_batch: int
    prompts: list[str] | None

    def build_spec(self) -> BuildSpec:
        """Returns the description of the artifact, whose fields are its identity."""
        entry, prompts = self.entry, self.prompts
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
            "prompts": None if prompts is None else prompts_name(entry, self.config.prompts),
            "prompts_sha256": None if prompts is None else sha256("\n".join(prompts).encode()).hexdigest(),
        }
        return BuildSpec("collect", None, fields, self.config.seed, (), self.ref)

    def _conditions(self) -> dict[str, Any]:
        """Returns the facts that only some pipelines have; one that is not used is absent and changes no identity."""
        fields = dict[str, Any]()
        if self.entry.images is not None:
            fields["images_sha256"] = images_sha256(Path(self.entry.images))
        if self.entry.call_arguments:
            fields["call_arguments"] = self.entry.call_arguments
        return fields


def decided(
    config: CollectConfig, ref: ModelRef, entry: ModelEntry, given: list[str] | None, *, takes_prompts: bool
) -> Choices:
    """Decides what a configuration leaves open by the defaults of its model.

    Args:
        config: The configuration.
        ref: The model's identity.
        entry: The model's defaults, with the sizes and the images of the configuration.
        given: The prompts of the user's file; `None` if there is no file.
        takes_prompts: Whether the pipeline takes prompts.
    """
    num_trajectories = config.num_trajectories or entry.num_trajectories
    return Choices(
        config=config,
        ref=ref,
        entry=entry,
        num_trajectories=num_trajectories,
        num_steps=config.num_steps or entry.num_steps,
        guidance_scale=entry.guidance_scale if config.guidance_scale is None else config.guidance_scale,
        batch_size=min(config.batch_size or entry.batch_size, num_trajectories),
        feature_batch=min(config.feature_batch or entry.feature_batch, num_trajectories),
        prompts=prompts_of(entry, given, num_trajectories, config.seed) if takes_prompts else None,
    )


def with_images(entry: ModelEntry, config: CollectConfig) -> ModelEntry:
    """Returns a model's defaults with the folder of images that a configuration names."""
    if config.images is None:
        return entry
    return entry.model_copy(update={"images": str(config.images.expanduser().resolve())})


def recalled(config: CollectConfig, run_folder: RunFolder) -> Choices | None:
    """Returns the choices of a configuration if the artifact on disk was made by them; `None` if that is not certain.

    The artifact says what its pipeline said then: whether it takes prompts, and its defaults if its name is not known.
    The pipeline says the same now if its files and the versions of the libraries are the same, so it need not be
    loaded. That is left to the pipeline itself for a model of the hub, whose newest commit diffusers looks up, and for
    a single file, which is converted before it is described.
    """
    try:
        if not run_folder.has("collect"):
            return None
        path = run_folder.path("collect")
        artifact = Artifact(path, read_manifest(path))  # whoever reuses the artifact checks its files
        sampling = Sampling.load(artifact)
        entry = _entry(config, artifact, sampling)
        given = None if config.prompts is None else read_prompts(config.prompts)
        takes_prompts = sampling.prompts is not None
        if entry is None or (given is not None and not takes_prompts):
            return None
        choices = decided(config, artifact.manifest.model, entry, given, takes_prompts=takes_prompts)
        if choices.build_spec().identity != artifact.identity:
            return None
        return choices if _fingerprint(config.model) == choices.ref.fingerprint else None
    except (EdadmError, OSError, RuntimeError, ValueError):  # whoever prepares the collection says what is wrong
        return None


def _entry(config: CollectConfig, artifact: Artifact, sampling: Sampling) -> ModelEntry | None:
    """Returns the model's defaults with what the configuration changes; `None` if the pipeline has to say them."""
    entry = known_models().get(config.model)
    place = config.model if entry is not None else str(Path(config.model).expanduser().resolve())
    if place != artifact.manifest.model.id:
        return None
    if entry is None:
        if sampling.entry.source != "folder" or not _is_of_these_versions(artifact):
            return None
        # the defaults of a pipeline whose name is not known have none of these
        entry = sampling.entry.model_copy(update={"call_arguments": {}, "images": None, "scheduler_config": {}})
    entry = with_images(entry, config)
    if sizes := config.sizes():
        entry = entry_with_sizes(entry, sizes)
    if config.prediction_type is not None:
        scheduler_config = {**entry.scheduler_config, "prediction_type": config.prediction_type}
        entry = entry.model_copy(update={"scheduler_config": scheduler_config})
    return entry


def _is_of_these_versions(artifact: Artifact) -> bool:
    """Returns whether an artifact was made by the installed versions of all that describes a pipeline."""
    then, now = artifact.manifest.environment, environment_facts()
    libraries = ("diffusers", "transformers")
    return artifact.manifest.tool.version == __version__ and all(then.get(name) == now.get(name) for name in libraries)


def _fingerprint(model: str) -> str | None:
    """Returns the fingerprint of a model whose files are here; `None` if it cannot be found without its pipeline."""
    entry = known_models().get(model)
    if entry is not None and is_random(model, entry):
        return load_architecture(entry.location).fingerprint(entry.weights_seed, WEIGHTS_VERSION)
    if entry is not None and entry.source == "hub":
        return None
    path, _ = files_of(model, entry)
    return likely_fingerprint(path.resolve()) if path.is_dir() else None
