"""Stages `sheets` and `measure`: write sheets of what the trained models generate, and measure it."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from diffusers import DiffusionPipeline

from edadm_cli.models.emoji.captions import prompt_of
from edadm_cli.models.emoji.train.corpus import Corpus
from edadm_cli.models.emoji.train.measure import (
    Judge,
    frechet,
    generate,
    generate_pixels,
    measure_text_model,
    real_floor,
    sheets_of,
    write_sheet,
)
from edadm_cli.models.emoji.train.packed import small_pictures
from edadm_cli.models.emoji.train.pipelines import (
    PIXEL,
    UNET,
    flow_pipeline,
    load_tokenizer,
    pixel_pipeline,
    text_to_image_pipeline,
    write_json,
)
from edadm_cli.models.emoji.train.settings import TrainSettings


def pipeline_of(model: str, settings: TrainSettings) -> DiffusionPipeline:
    """Returns the pipeline of a trained model on the run's device."""
    build = {UNET: text_to_image_pipeline, PIXEL: pixel_pipeline}.get(model, flow_pipeline)
    pipeline = build(settings).to(settings.device)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    return pipeline


def show(corpus: Corpus, settings: TrainSettings, options: argparse.Namespace) -> None:
    """Writes sheets of 100 pictures: real ones, and those that each model generates from the same prompts."""
    for model in options.models.split(","):
        pipeline = pipeline_of(model, settings)
        if model == PIXEL:
            write_sheet(generate_pixels(pipeline, 100), settings.out / "samples" / f"{model}.png")
            continue
        for sheet, rows in sheets_of(corpus):
            write_sheet(corpus.pixels[rows], settings.out / "samples" / f"real-{sheet}.png")
            prompts = [prompt_of(corpus.names[i], corpus.styles[i]) for i in rows]
            (settings.out / "samples" / f"prompts-{sheet}.txt").write_text("\n".join(prompts) + "\n")
            for guidance in options.guidance.split(","):
                pictures = generate(pipeline, prompts, float(guidance))
                write_sheet(pictures, settings.out / "samples" / f"{model}-{sheet}-{guidance}.png")


def measure(corpus: Corpus, settings: TrainSettings, options: argparse.Namespace) -> None:
    """Measures each model at each guidance scale, and compares real pictures with real pictures."""
    judge = Judge(settings, load_tokenizer(settings))
    for model in options.models.split(","):
        result: dict[str, Any] = {"model": model, "floor": real_floor(judge, corpus, options.pictures)}
        pipeline = pipeline_of(model, settings)
        if model == PIXEL:
            real, _ = judge.pictures(small_pictures(corpus.pixels[corpus.train]))
            features, _ = judge.pictures(generate_pixels(pipeline, options.pictures))
            result["frechet_to_train"] = frechet(features, real)
        else:
            result["guidance"] = [
                measure_text_model(pipeline, judge, corpus, float(guidance), options.pictures)
                for guidance in options.guidance.split(",")
            ]
        write_json(settings.out / "records" / f"measure-{model}-{options.guidance}.json", result)
