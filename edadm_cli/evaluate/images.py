"""Samples images in batches of known seeds and stores every batch, so that a killed stage can resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from edadm_cli.artifacts import load_tensors, read_tensor_header, save_tensors
from edadm_cli.errors import InputError
from edadm_cli.evaluate.request import SamplingPlan
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.models.pipeline_calls.sampling import Samples, sample
from edadm_cli.processes import Processes
from edadm_cli.progress import Reporter

BATCH_PATTERN = "batch-*.safetensors"


class SampledImages(Dataset[Tensor]):
    """Images on disk as a dataset of uint8 `(3, H, W)`, with the latents they were decoded from.

    Args:
        folder: The folder of the batches.
        plan: The images that were sampled.
    """

    def __init__(self, folder: Path, plan: SamplingPlan) -> None:
        self.folder = folder
        self.plan = plan
        self._cached: tuple[int, Tensor] | None = None
        self._shapes: tuple[torch.Size, torch.Size] | None = None

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> Tensor:
        number, place = divmod(index, self.plan.batch_size)
        if self._cached is None or self._cached[0] != number:
            self._cached = (number, self.batch(number).images)
        return to_rgb(self._cached[1][place])

    def batch(self, number: int) -> Samples:
        """Reads one batch.

        Raises:
            InputError: The file does not hold the images and latents of the batch.
        """
        path = batch_path(self.folder, number)
        tensors, start = load_tensors(path), number * self.plan.batch_size
        images, latents = tensors.get("images"), tensors.get("latents")
        count = min(self.plan.batch_size, len(self) - start)
        if images is not None and latents is not None and _are_images(images) and latents.ndim > 1:
            shapes = images.shape[1:], latents.shape[1:]
            self._shapes = self._shapes or shapes  # of the first batch that was read
            if len(images) == len(latents) == count and shapes == self._shapes:
                return Samples(images, latents)
        raise InputError(
            f"{path} does not hold {count:,} images with their latents, of the same shape in all files.",
            hint=f"remove the folder {self.folder}, and type the same command again",
        )

    def require_shapes_of(self, other: SampledImages) -> None:
        """Checks that the images and latents have the shapes of other ones of the same plan.

        Raises:
            InputError: A shape differs, so that they cannot be compared.
        """
        for name in ("images", "latents"):
            first, second = (tuple(getattr(each.batch(0), name).shape) for each in (self, other))
            if first != second:
                raise InputError(f"The {name} in {self.folder} have the shape {first}, and in {other.folder} {second}.")

    def batches(self) -> Iterator[tuple[slice, Samples]]:
        """Yields the range of each batch's images in the set, and the batch."""
        for number, places in self.plan.batches():
            yield places, self.batch(number)

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the images `(n, C, H, W)`, gray ones with one channel, and the latents of each batch."""
        for _, batch in self.batches():
            yield batch.images, batch.latents

    def first(self, count: int) -> Tensor:
        """Returns the first images, uint8 with shape `(count, 3, H, W)`."""
        return torch.stack([self[index] for index in range(min(count, len(self)))])


def batch_path(folder: Path, number: int) -> Path:
    """Returns the path of a batch."""
    return folder / f"batch-{number:05d}.safetensors"


def _are_images(tensor: Tensor) -> bool:
    """Returns whether a tensor holds gray or coloured images, `(n, C, H, W)`, of 8-bit levels."""
    return tensor.dtype == torch.uint8 and tensor.ndim == 4 and tensor.shape[1] in (1, 3) and tensor.numel() > 0


def to_rgb(image: Tensor) -> Tensor:
    """Returns an image with three channels: the channel of a gray image `(1, H, W)` is repeated."""
    return image.expand(3, -1, -1) if image.shape[0] == 1 else image


def sample_images(
    plan: SamplingPlan,
    folder: Path,
    load: Callable[[], LoadedModel],
    processes: Processes,
    reporter: Reporter,
    description: str,
) -> SampledImages:
    """Samples the batches that are not on disk yet, each in one of the processes.

    Args:
        plan: The images to sample.
        folder: The folder of the batches.
        load: Loads the pipeline; called only if a batch is missing.
        processes: The processes that share the work.
        reporter: Receives the progress.
        description: The title of the progress bar.

    Raises:
        InputError: The pipeline samples broken images.
    """
    model: LoadedModel | None = None
    batches = [(number, places) for number, places in plan.batches() if number % processes.count == processes.index]
    with reporter.task(description, sum(places.stop - places.start for _, places in batches)) as advance:
        for number, places in batches:
            path = batch_path(folder, number)
            if not _is_complete(path, places.stop - places.start):
                model = model if model is not None else load()
                batch = sample_batch(model, plan, places)
                save_tensors(path, {"images": batch.images, "latents": batch.latents})
            processes.check()
            advance(places.stop - places.start)
    processes.wait()
    return SampledImages(folder, plan)


def _is_complete(path: Path, count: int) -> bool:
    """Returns whether a complete batch is on disk; a truncated or other file is sampled again."""
    if not path.is_file():
        return False
    try:
        header = read_tensor_header(path)
    except InputError:
        return False
    return header.keys() == {"images", "latents"} and all(info.shape[:1] == (count,) for info in header.values())


def sample_batch(model: LoadedModel, plan: SamplingPlan, places: slice) -> Samples:
    """Samples one batch and checks it."""
    batch = sample(
        model,
        seeds=plan.seeds[places],
        prompts=None if plan.prompts is None else plan.prompts[places],
        num_steps=plan.num_steps,
        guidance_scale=plan.guidance_scale,
    )
    check_images(batch, plan.seeds[places], model.ref.id)
    return batch


def check_images(batch: Samples, seeds: Sequence[int], model: str) -> None:
    """Refuses images whose quality cannot be measured.

    Raises:
        InputError: A latent is not finite or is zero throughout, or all of several images are of one colour.
    """
    latents = batch.latents.flatten(1)
    is_broken = ~torch.isfinite(latents).all(dim=1) | (latents == 0).all(dim=1)
    if bool(is_broken.any()):
        seed = seeds[int(is_broken.nonzero()[0])]
        raise InputError(
            f"{model} is broken: the image of seed {seed} comes from values that are all zero or not finite.",
            hint="edadm reconstruct, with more bits or another recipe",
        )
    levels = batch.images.flatten(1)
    if len(levels) > 1 and bool((levels.amax(dim=1) == levels.amin(dim=1)).all()):
        raise InputError(
            f"{model} is broken: each of {len(levels)} images is of one flat colour.",
            hint="edadm reconstruct, with more bits or another recipe",
        )
