"""Writes the folder that ships: pipelines, shared components, statistics, names and licence notices."""

from __future__ import annotations

import gzip
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from edadm_cli.models.emoji.captions import STYLES
from edadm_cli.models.emoji.data import NAMES_FILE, PICTURES_FILE, STATISTICS_FILE
from edadm_cli.models.emoji.encoder import PictureEncoder, PictureFeatures
from edadm_cli.models.emoji.train.corpus import Corpus
from edadm_cli.models.emoji.train.measure import NUM_NAMES
from edadm_cli.models.emoji.train.pipelines import TRANSFORMER, UNET, flow_pipeline, text_to_image_pipeline, write_json
from edadm_cli.models.emoji.train.prepare import CARD, TOKENIZER
from edadm_cli.models.emoji.train.settings import TrainSettings
from edadm_cli.models.real_statistics import pack

_SHEET_COLUMNS = 4  # in a narrow sheet pictures of one style lie near each other, which makes the file smaller


def package(corpus: Corpus, settings: TrainSettings, folder: Path) -> None:
    """Writes everything that ships into `folder`, with weights in float16."""
    for name, pipeline in ((UNET, text_to_image_pipeline(settings)), (TRANSFORMER, flow_pipeline(settings))):
        (folder / name).mkdir(parents=True, exist_ok=True)
        pipeline.save_config(folder / name)
        _clean_index(folder / name / "model_index.json")
        pipeline.scheduler.save_pretrained(folder / name / "scheduler")
    for source in sorted(settings.weights.rglob("*")):
        place = folder / source.relative_to(settings.weights)
        if source.is_file() and "ddpm-emoji" not in source.parts:
            place.parent.mkdir(parents=True, exist_ok=True)
            _copy_in_half(source, place)
    shutil.copytree(settings.data / TOKENIZER, folder / "shared" / "tokenizer", dirs_exist_ok=True)
    _compact(folder / "shared" / "tokenizer" / "tokenizer.json")
    data = folder / "data"
    data.mkdir(exist_ok=True)
    shutil.copyfile(settings.data / CARD, data / CARD)
    known = names_of(corpus)
    packed = gzip.compress(json.dumps(known, separators=(",", ":")).encode(), mtime=0)
    (data / NAMES_FILE).write_bytes(packed)
    encoder = PictureEncoder()
    path = settings.weights / "shared" / "picture_encoder" / "model.safetensors"
    encoder.load_state_dict({name: value.half().float() for name, value in load_file(path).items()})
    pixels = corpus.pixels[corpus.train]
    save_file(pack(statistics_of(encoder.to(settings.device).eval(), pixels)), data / STATISTICS_FILE)
    write_pictures(corpus.pixels[corpus.held_out], data / PICTURES_FILE)
    write_json(folder / "training.json", _records(settings.out / "records"))


def names_of(corpus: Corpus) -> dict[str, Any]:
    """Returns the names by style, the held-out names, and the 500 names among which pictures are retrieved."""
    by_style = {
        style: sorted({n for n, s in zip(corpus.names, corpus.styles, strict=True) if s == style})
        for style in STYLES.values()
    }
    everything = torch.arange(len(corpus.names))
    order = random.Random("emoji retrieval").sample(everything.tolist(), len(everything))
    retrieval = list(dict.fromkeys(corpus.names[i] for i in order))[:NUM_NAMES]
    return {
        "by_style": by_style,
        "held_out": sorted({corpus.names[i] for i in corpus.held_out.tolist()}),
        "held_out_pictures": len(corpus.held_out),
        "retrieval": sorted(retrieval),
    }


def statistics_of(encoder: PictureEncoder, pixels: Tensor) -> dict[str, Tensor]:
    """Returns the mean and covariance of the encoder's features over uint8 pictures `(N, 3, H, W)`, in float32."""
    with torch.inference_mode():
        parts: list[PictureFeatures] = [encoder(part.float() / 255) for part in pixels.split(250)]
    stacked = {
        "features": torch.cat([part.features for part in parts]).double(),
        "spatial": torch.cat([part.spatial.flatten(1) for part in parts]).double(),
    }
    return {
        f"{kind}_{moment}": value.float().cpu().contiguous()
        for kind, rows in stacked.items()
        for moment, value in (("mean", rows.mean(0)), ("cov", torch.cov(rows.T)))
    }


def write_pictures(pixels: Tensor, path: Path) -> None:
    """Writes pictures as one sheet without gaps, losslessly compressed, with 7 bits per channel and an exact white.

    The eighth bit (one level of 255) would take a seventh of the file, and it is not visible.
    """
    white = pixels == 255
    pixels = ((pixels.int() + 1) // 2 * 2).clamp(max=254).to(torch.uint8).masked_fill(white, 255)
    rows = -(-len(pixels) // _SHEET_COLUMNS)
    size = pixels.shape[-1]
    tiles = numpy.full((rows * _SHEET_COLUMNS, size, size, 3), 255, dtype=numpy.uint8)
    tiles[: len(pixels)] = pixels.cpu().permute(0, 2, 3, 1).numpy()
    sheet = tiles.reshape(rows, _SHEET_COLUMNS, size, size, 3).transpose(0, 2, 1, 3, 4)
    image = Image.fromarray(sheet.reshape(rows * size, _SHEET_COLUMNS * size, 3))
    image.save(path, lossless=True, quality=100, method=6)


def _copy_in_half(source: Path, place: Path) -> None:
    if source.suffix != ".safetensors":
        shutil.copyfile(source, place)
        return
    state = {name: value.half() if value.is_floating_point() else value for name, value in load_file(source).items()}
    save_file(state, place, metadata={"format": "pt"})


def _compact(path: Path) -> None:
    """Rewrites a JSON file without spaces."""
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


def _clean_index(path: Path) -> None:
    """Removes from a pipeline's index the entries that say where its components were loaded from."""
    index = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in index.items() if k != "_name_or_path"}, indent=2) + "\n")


def _records(folder: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
