"""Measures models and writes sheets of pictures.

The metrics are the Fréchet distance of the encoder's features, and the retrieval of a picture's name among 500.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextModelWithProjection

from edadm_cli.models.emoji.captions import MAX_TOKENS, prompt_of
from edadm_cli.models.emoji.encoder import PictureEncoder
from edadm_cli.models.emoji.train.autoencoder import to_pixels
from edadm_cli.models.emoji.train.corpus import Corpus
from edadm_cli.models.emoji.train.settings import TrainSettings

NUM_NAMES = 500
STEPS = 25
PIXEL_STEPS = 50  # the default of DDIMPipeline
_BATCH = 250


class Judge:
    """Computes features and retrieval metrics with the picture-and-name encoder, on the run's device."""

    def __init__(self, settings: TrainSettings, tokenizer: Any) -> None:
        shared = settings.weights / "shared"
        self._device, self._tokenizer = settings.device, tokenizer
        self._pictures = PictureEncoder()
        self._pictures.load_state_dict(load_file(shared / "picture_encoder" / "model.safetensors"))
        self._pictures.to(settings.device).eval()
        text = CLIPTextModelWithProjection.from_pretrained(shared / "text_encoder")
        self._text = text.to(settings.device, torch.float32).eval()

    @torch.inference_mode()
    def pictures(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the features and the unit vectors of uint8 pictures `(N, 3, 64, 64)`."""
        parts = [self._pictures(part.to(self._device).float() / 255) for part in pixels.split(500)]
        return torch.cat([p.features for p in parts]), torch.cat([p.embedding for p in parts])

    @torch.inference_mode()
    def prompts(self, prompts: list[str]) -> Tensor:
        """Returns one unit vector per prompt, with shape `(N, 192)`."""
        tokens = self._tokenizer(
            prompts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
        ).input_ids.to(self._device)
        vectors = torch.cat([self._text(part).text_embeds for part in tokens.split(1000)])
        return torch.nn.functional.normalize(vectors, dim=-1)

    def retrieval(self, pixels: Tensor, names: list[str], styles: list[str], candidates: list[str]) -> dict[str, float]:
        """Returns the shares of pictures whose name ranks first, or among the first five, of the candidates.

        All candidates are put into prompts with the picture's own style, so that only the name decides.
        """
        _, embedding = self.pictures(pixels)
        number = {name: i for i, name in enumerate(candidates)}
        true = torch.tensor([number[name] for name in names], device=self._device)
        top1 = torch.zeros(len(names), device=self._device)
        top5 = torch.zeros_like(top1)
        for style in sorted(set(styles)):
            rows = torch.tensor([i for i, its_style in enumerate(styles) if its_style == style], device=self._device)
            scores = embedding[rows] @ self.prompts([prompt_of(name, style) for name in candidates]).T
            order = scores.topk(5).indices
            hits = order == true[rows, None]
            top1[rows], top5[rows] = hits[:, 0].float(), hits.any(1).float()
        return {"top1": top1.mean().item(), "top5": top5.mean().item()}


def frechet(first: Tensor, second: Tensor) -> float:
    """Returns the Fréchet distance of the normal distributions that are fitted to two sets of features `(N, D)`."""
    first, second = first.double(), second.double()
    mean = (first.mean(0) - second.mean(0)).square().sum()
    one, two = torch.cov(first.T), torch.cov(second.T)
    values, vectors = torch.linalg.eigh(one)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    mixed = torch.linalg.eigvalsh(root @ two @ root).clamp(min=0).sqrt().sum()
    return (mean + one.trace() + two.trace() - 2 * mixed).item()


def choose(corpus: Corpus, rows: Tensor, count: int, name: str) -> list[int]:
    """Returns the indices of up to `count` pictures out of `rows`, in a seeded random choice."""
    indices = rows.tolist()
    return random.Random(f"emoji measure {name}").sample(indices, min(count, len(indices)))


def candidate_names(corpus: Corpus, rows: list[int]) -> list[str]:
    """Returns the names of the pictures `rows`, filled up to 500 names with a seeded random choice of others."""
    needed = sorted({corpus.names[i] for i in rows})
    others = sorted(set(corpus.names) - set(needed))
    random.Random("emoji candidates").shuffle(others)
    return needed + others[: max(0, NUM_NAMES - len(needed))]


def distinct_names(corpus: Corpus, rows: Tensor, count: int, name: str) -> list[int]:
    """Returns the indices of up to `count` pictures out of `rows` that have at most 500 different names together."""
    order = choose(corpus, rows, len(rows), name)
    names = sorted({corpus.names[i] for i in order})
    allowed = set(random.Random(f"emoji names {name}").sample(names, min(NUM_NAMES, len(names))))
    return [i for i in order if corpus.names[i] in allowed][:count]


@torch.inference_mode()
def generate(pipeline: DiffusionPipeline, prompts: list[str], guidance: float, seed: int = 0) -> Tensor:
    """Returns one uint8 picture per prompt, `(N, 3, 64, 64)`, on the CPU; each picture has its own seeded noise."""
    pipeline.set_progress_bar_config(disable=True)
    device = pipeline.device
    pictures = []
    for start in range(0, len(prompts), _BATCH):
        part = prompts[start : start + _BATCH]
        noise = [
            torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(seed * 100_003 + start + i))
            for i in range(len(part))
        ]
        result = pipeline(
            part,
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            latents=torch.stack(noise).to(device),
            output_type="pt",
        )
        pictures.append(to_pixels(result.images * 2 - 1).cpu())
    return torch.cat(pictures)


@torch.inference_mode()
def generate_pixels(pipeline: DiffusionPipeline, count: int, steps: int = PIXEL_STEPS) -> Tensor:
    """Returns uint8 pictures `(N, 3, 32, 32)` of the unconditional model, on the CPU."""
    scheduler, network = pipeline.scheduler, pipeline.unet
    scheduler.set_timesteps(steps)
    pictures = []
    for start in range(0, count, 500):
        images = torch.randn(min(500, count - start), 3, 32, 32, generator=torch.Generator().manual_seed(start))
        images = images.to(network.device)
        for timestep in scheduler.timesteps:
            images = scheduler.step(network(images, timestep).sample, timestep, images).prev_sample
        pictures.append(to_pixels(images).cpu())
    return torch.cat(pictures)


def sheets_of(corpus: Corpus) -> Iterator[tuple[str, list[int]]]:
    """Yields the name of each sheet and the indices of its 100 pictures."""
    yield "train", choose(corpus, corpus.train, 100, "sheet")
    yield "held-out", choose(corpus, corpus.held_out, 100, "sheet")


def write_sheet(pixels: Tensor, path: Path, columns: int = 10) -> None:
    """Writes uint8 pictures as the tiles of one PNG file."""
    rows = -(-len(pixels) // columns)
    size = pixels.shape[-1]
    sheet = numpy.full((rows * (size + 2), columns * (size + 2), 3), 255, dtype=numpy.uint8)
    for i, picture in enumerate(pixels.cpu().permute(0, 2, 3, 1).numpy()):
        top, left = divmod(i, columns)
        sheet[top * (size + 2) :, left * (size + 2) :][:size, :size] = picture
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path)


def real_floor(judge: Judge, corpus: Corpus, count: int) -> dict[str, Any]:
    """Returns the metrics of real pictures, as the best values to expect.

    They are the retrieval of trained and held-out names, and the Fréchet distances of a half of the pictures to the
    other half and to all training pictures.
    """
    order = choose(corpus, corpus.train, 2 * count, "floor")
    half = len(order) // 2
    features, _ = judge.pictures(corpus.pixels[order])
    return {
        "frechet_real_to_real": frechet(features[:half], features[half:]),
        "frechet_real_to_train": frechet(features[:half], judge.pictures(corpus.pixels[corpus.train])[0]),
        "pictures_per_half": half,
        "train": retrieval_of(judge, corpus, "train", count, None),
        "held_out": retrieval_of(judge, corpus, "held_out", count, None),
    }


def rows_of(corpus: Corpus, split: str, count: int) -> list[int]:
    """Returns the indices of the pictures of a split that are measured."""
    return distinct_names(corpus, corpus.train if split == "train" else corpus.held_out, count, split)


def retrieval_of(judge: Judge, corpus: Corpus, split: str, count: int, pictures: Tensor | None) -> dict[str, float]:
    """Returns the retrieval metrics of generated pictures, or of the real ones if `pictures` is `None`."""
    rows = rows_of(corpus, split, count)
    pixels = corpus.pixels[rows] if pictures is None else pictures
    names, styles = [corpus.names[i] for i in rows], [corpus.styles[i] for i in rows]
    return judge.retrieval(pixels, names, styles, candidate_names(corpus, rows)) | {"pictures": len(rows)}


def measure_text_model(
    pipeline: DiffusionPipeline, judge: Judge, corpus: Corpus, guidance: float, count: int
) -> dict[str, Any]:
    """Returns the Fréchet distance to all training pictures, and the retrieval of trained and held-out names."""
    result: dict[str, Any] = {"guidance": guidance, "steps": STEPS}
    rows = choose(corpus, corpus.train, count, "floor")
    pictures = generate(pipeline, [prompt_of(corpus.names[i], corpus.styles[i]) for i in rows], guidance)
    features, _ = judge.pictures(pictures)
    real, _ = judge.pictures(corpus.pixels[corpus.train])
    result["frechet_to_train"], result["pictures"] = frechet(features, real), len(rows)
    for split in ("train", "held_out"):
        rows = rows_of(corpus, split, count // 2)
        prompts = [prompt_of(corpus.names[i], corpus.styles[i]) for i in rows]
        result[split] = retrieval_of(judge, corpus, split, count // 2, generate(pipeline, prompts, guidance, seed=1))
    return result
