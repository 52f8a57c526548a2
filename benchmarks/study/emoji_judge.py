"""How `benchmarks/emoji.py` judges pictures: the two feature extractors, and what is compared with full precision."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from edadm_cli.artifacts import RunFolder
from edadm_cli.evaluate.efficientnet import efficientnet_space
from edadm_cli.evaluate.emoji_features import emoji_space
from edadm_cli.evaluate.real import shipped_emoji
from edadm_cli.evaluate.real_files import ArrayImages
from edadm_cli.metrics.distances import perceptual_distance, relative_l2, ssim
from edadm_cli.metrics.fidelity import feature_statistics, frechet_distance
from edadm_cli.metrics.representation import LAYERS, Features, Layer, Statistics
from edadm_cli.models.collected import CollectedRun
from edadm_cli.models.emoji.data import STATISTICS_FILE, label_of_prompt, real_pictures
from edadm_cli.models.emoji.train.measure import frechet
from edadm_cli.models.emoji.train.packed import small_pictures
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.models.pipeline_calls.sampling import sample
from edadm_cli.models.pipeline_calls.seeds import EVALUATION, image_seed
from edadm_cli.models.real_statistics import unpack
from edadm_cli.models.shipped import shipped_prompts

COLUMNS = 12
SHOWN = 48  # pictures of a row that are saved
FEWEST_NEW = 100  # pictures with new prompts whose mean distance is stated


def prompts_of(collected: CollectedRun, count: int, seed: int) -> list[str] | None:
    """Returns the prompts that `edadm evaluate` would use; `None` if the model takes none."""
    source = collected.entry.prompts
    return None if source is None else shipped_prompts(source, count, seed)


def labels(prompts: list[str] | None) -> Tensor | None:
    """Returns the number of the name that each prompt asks for, -1 for none; `None` if there are no prompts."""
    if prompts is None:
        return None
    numbers = [label_of_prompt(prompt) for prompt in prompts]
    return torch.tensor([-1 if number is None else number for number in numbers])


def generate(model: LoadedModel, collected: CollectedRun, seed: int, count: int, batch: int) -> tuple[Tensor, Tensor]:
    """Returns pictures (uint8) and final latents of the seeds that an evaluation uses, `batch` of them at a time."""
    prompts, parts = prompts_of(collected, count, seed), []
    for start in range(0, count, batch):
        numbers = range(start, min(start + batch, count))
        parts.append(
            sample(
                model,
                seeds=[image_seed(seed, number, EVALUATION) for number in numbers],
                prompts=None if prompts is None else [prompts[number] for number in numbers],
                num_steps=collected.num_steps,
                guidance_scale=collected.guidance_scale,
            )
        )
    return torch.cat([part.images for part in parts]), torch.cat([part.latents for part in parts])


def save_sheet(pictures: Tensor, path: Path) -> None:
    """Saves the first pictures in rows of 12, without loss."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = min(COLUMNS, len(pictures))
    shown = pictures[: min(SHOWN, len(pictures)) // columns * columns].permute(0, 2, 3, 1)  # [N, H, W, 3]
    rows = [torch.cat([*row], 1) for row in shown.split(columns)]
    Image.fromarray(torch.cat(rows).numpy()).save(path, lossless=True)


def save_comparison(out: Path, model: str, rows: list[str], path: Path) -> None:
    """Saves the first pictures of seed 0 at full precision, and below them those of some rows, without loss."""
    names = ["full-precision-0", *(f"{row}-0" for row in rows)]
    sheets = [Image.open(out / "pictures" / f"{model}-{name}.webp") for name in names]
    height, gap = sheets[0].width // COLUMNS, 8
    width = 10 * height
    comparison = Image.new("RGB", (width, (height + gap) * len(names) - gap), "white")
    for number, sheet in enumerate(sheets):
        comparison.paste(sheet.crop((0, 0, width, height)), (0, number * (height + gap)))
    comparison.save(path, lossless=True, quality=100, method=6)


class Judge:
    """Both feature extractors, and the real pictures.

    Args:
        device: The device that computes.
        small: The folder of `ddpm-emoji` with the statistics of its training pictures, if its pictures are judged: then
            all real pictures have 32x32 pixels.
    """

    def __init__(self, device: str, small: Path | None) -> None:
        self.device = torch.device(device)
        self.spaces = {"emoji": emoji_space(self.device), "imagenet": efficientnet_space(self.device)}
        pictures = real_pictures() if small is None else small_pictures(real_pictures())
        self.real = self.spaces["imagenet"].extract(ArrayImages(pictures)).pooled
        self.statistics = shipped_emoji().statistics() if small is None else read_statistics(small)

    def features(self, pictures: Tensor) -> dict[str, Features]:
        """Returns the features of pictures in both spaces."""
        return {name: space.extract(ArrayImages(pictures)) for name, space in self.spaces.items()}

    def metrics(self, features: dict[str, Features], names: Tensor | None) -> dict[str, float]:
        """Returns the metrics of a set of pictures by itself; without `names` there is no retrieval."""
        real, emoji = self.statistics, features["emoji"]
        imagenet, imagenet_real = (each.to(self.device) for each in (features["imagenet"].pooled, self.real))
        metrics = {
            "frechet": frechet_distance(feature_statistics(emoji.pooled), real["pooled"]),
            "frechet_spatial": frechet_distance(feature_statistics(emoji.spatial), real["spatial"]),
            "frechet_imagenet": frechet(imagenet, imagenet_real),
            "kernel_imagenet": kernel_distance(imagenet, imagenet_real),
        }
        return metrics if names is None else metrics | retrieval(emoji, names)


def retrieval(emoji: Features, names: Tensor) -> dict[str, float]:
    """Returns the shares of the pictures with a name whose name ranks first, or among the first five."""
    named = names >= 0
    hits = emoji.logits.cpu()[named].topk(5).indices == names[named, None]
    return {"top1": float(hits[:, 0].double().mean()), "top5": float(hits.any(1).double().mean())}


def read_statistics(folder: Path) -> dict[Layer, Statistics]:
    """Returns the statistics of training pictures that lie in a folder."""
    stored = unpack(load_file(folder / STATISTICS_FILE))
    kinds: dict[Layer, str] = {"pooled": "features", "spatial": "spatial"}
    return {
        layer: Statistics(stored[f"{kind}_mean"].numpy(), stored[f"{kind}_cov"].numpy())
        for layer, kind in kinds.items()
    }


@cache
def judge(device: str, small: Path | None = None) -> Judge:
    """Returns the judge of a process, of pictures of 64x64 pixels or of those of `ddpm-emoji`."""
    return Judge(device, small)


def kernel_distance(first: Tensor, second: Tensor) -> float:
    """Returns the unbiased squared MMD with the kernel (x . y / D + 1)^3, over all rows at once."""
    size = first.shape[1]

    def kernel(one: Tensor, two: Tensor) -> Tensor:
        return (one.double() @ two.double().T / size + 1) ** 3

    def within(rows: Tensor) -> Tensor:
        values = kernel(rows, rows)
        return (values.sum() - values.trace()) / (len(rows) * (len(rows) - 1))

    return float(within(first) + within(second) - 2 * kernel(first, second).mean())


def exact_file(folder: RunFolder, count: int) -> Path:
    """Returns the file of the first `count` pictures of full precision."""
    return folder.root / f"full-precision-{count}.safetensors"


def save_exact(folder: RunFolder, pictures: Tensor, latents: Tensor, features: dict[str, Features]) -> None:
    """Saves what rows compare themselves with."""
    tensors = {"pictures": pictures, "latents": latents}
    for space, values in features.items():
        tensors |= {f"{space}.{layer}": values.layer(layer) for layer in ("pooled", "spatial", "logits")}
    path = exact_file(folder, len(pictures))
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)


def load_exact(folder: RunFolder, count: int) -> tuple[Tensor, Tensor, dict[str, Features]]:
    """Returns the first `count` pictures of full precision, their final latents and features."""
    tensors = load_file(exact_file(folder, count))
    spaces = ("emoji", "imagenet")
    features = {space: Features(**{layer: tensors[f"{space}.{layer}"] for layer in LAYERS}) for space in spaces}
    return tensors["pictures"], tensors["latents"], features


def new_prompts(collected: CollectedRun, count: int, seed: int) -> Tensor:
    """Returns which of the judged pictures have a prompt that no trajectory of the collection has, `[count]`."""
    prompts, known = prompts_of(collected, count, seed), set(collected.prompts or ())
    return torch.tensor([prompts is not None and prompts[number] not in known for number in range(count)])


def paired(
    pictures: Tensor, latents: Tensor, features: dict[str, Features], reference: Any, is_new: Tensor, device: str
) -> dict[str, float]:
    """Returns the distances to full precision of the same seeds.

    `final_new` is the distance of the final latents over the pictures with prompts that are new, `is_new`; it is left
    out if there are fewer than 100.
    """
    exact, exact_latents, exact_features = reference
    distances = relative_l2(latents, exact_latents)
    new = {"final_new": float(distances[is_new].mean())} if int(is_new.sum()) >= FEWEST_NEW else {}
    return {
        "final": float(distances.mean()),
        **new,
        "ssim": float(ssim(pictures.to(device), exact.to(device)).mean()),
        "perceptual": float(perceptual_distance(features["emoji"], exact_features["emoji"]).mean()),
        "perceptual_imagenet": float(perceptual_distance(features["imagenet"], exact_features["imagenet"]).mean()),
    }
