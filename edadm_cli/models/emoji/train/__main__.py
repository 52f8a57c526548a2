"""The command line of the training. Each call runs one stage, which continues where an earlier call stopped.

    python -m edadm_cli.models.emoji.train STAGE --data prepared --out training

The stages depend on each other in this order: `pixels`, `encoder` and `autoencoder`, then `emoji-sd`, `emoji-dit` and
`ddpm-emoji`, then `measure` and `package`. Under torchrun, several GPUs train one network. docs/shipped.md says how the
shipped weights were made.

`ddpm-emoji` needs no other stage, and takes one file of pictures in place of the prepared folder:

    python -m edadm_cli.models.emoji.train pixels --data prepared --out training --pack pictures.npz
    python -m edadm_cli.models.emoji.train ddpm-emoji --data pictures.npz --out training --seconds 200 --compile
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from edadm_cli.errors import EdadmError, UsageError
from edadm_cli.models.emoji.data import WEIGHTS
from edadm_cli.models.emoji.train import autoencoder, denoisers, pair
from edadm_cli.models.emoji.train.corpus import Corpus, Pictures, load_corpus
from edadm_cli.models.emoji.train.loop import FitResult, Schedule, Task, fit
from edadm_cli.models.emoji.train.packed import load_packed, pack
from edadm_cli.models.emoji.train.pipelines import PIXEL, TRANSFORMER, UNET, write_json, write_text_encoder
from edadm_cli.models.emoji.train.prepare import CARD
from edadm_cli.models.emoji.train.settings import TrainSettings

_PACKAGES = ("torch", "diffusers", "transformers", "tokenizers", "safetensors", "numpy", "resvg-py")
STAGES: dict[str, tuple[Callable[[Any, TrainSettings], Any], Schedule]] = {
    pair.NAME: (pair.PairTask, pair.SCHEDULE),
    autoencoder.NAME: (autoencoder.AutoencoderTask, autoencoder.SCHEDULE),
    UNET: (denoisers.UNetTask, denoisers.UNET_SCHEDULE),
    TRANSFORMER: (denoisers.TransformerTask, denoisers.TRANSFORMER_SCHEDULE),
    PIXEL: (denoisers.PixelTask, denoisers.PIXEL_SCHEDULE),
}


def build_parser() -> argparse.ArgumentParser:
    """Builds the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m edadm_cli.models.emoji.train", description="Train the emoji models."
    )
    parser.add_argument("stage", choices=["pixels", *STAGES, "sheets", "measure", "package"])
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help=f"folder that edadm_cli.models.emoji.train.prepare wrote; {PIXEL} also takes the file of --pack",
    )
    parser.add_argument("--out", type=Path, required=True, help="gets weights/, samples/, checkpoints/")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, help="time that the stage may train, all calls together")
    parser.add_argument("--finish", action="store_true", help="let the stage's training end at --until")
    parser.add_argument("--wait", action="store_true", help="wait for the stages that the stage needs")
    parser.add_argument("--steps", type=int, help="number of steps instead of a time")
    parser.add_argument("--until", type=float, help="time of day, in seconds of time.time(), at which this call stops")
    parser.add_argument("--batch-size", type=int, help="pictures per step, all GPUs together")
    parser.add_argument("--limit", type=int, help="number of pictures to use, for tests")
    parser.add_argument("--small", action="store_true", help="tiny networks, for tests")
    parser.add_argument("--compile", action="store_true", help="compile the denoiser with torch.compile")
    parser.add_argument("--pack", type=Path, help=f"file that the stage pixels writes, for {PIXEL} alone")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="processes that rasterise")
    parser.add_argument("--pictures", type=int, default=2000, help="pictures that measure a model, 0 for none")
    parser.add_argument("--models", default=f"{UNET},{TRANSFORMER},{PIXEL}", help="models to measure or to show")
    parser.add_argument("--ship", type=Path, default=WEIGHTS, help="folder that package writes: %(default)s")
    parser.add_argument(
        "--weights",
        type=Path,
        help="folder of the weights to measure or to show, such as that of the shipped ones; by default OUT/weights",
    )
    parser.add_argument("--guidance", default="3", help="guidance scales to measure or to show, comma-separated")
    return parser


def settings_of(options: argparse.Namespace) -> TrainSettings:
    """Turns the options into settings, and joins the other processes under torchrun.

    Raises:
        UsageError: The stage writes weights, and is given a folder of weights to read.
    """
    if options.weights is not None and options.stage not in ("sheets", "measure"):
        raise UsageError(f"--weights goes with the stages sheets and measure, found {options.stage}.")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(options.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
    if world > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    left = None if options.until is None else max(0.0, options.until - time.time())
    return TrainSettings(
        data=options.data, out=options.out, device=device, rank=rank, world=world, seed=options.seed,
        seconds=options.seconds, steps=options.steps, stop_after=left,
        finish=options.finish, wait=options.wait, batch_size=options.batch_size,
        limit=options.limit, small=options.small, compile=options.compile,
        trained=options.weights,
    )  # fmt: skip


def load(options: argparse.Namespace, settings: TrainSettings) -> Corpus | Pictures:
    """Loads the data that a stage needs.

    Raises:
        InputError: A file is not one of packed pictures.
        UsageError: The stage needs more than the pictures, and the data is a file.
    """
    if not options.data.is_file():
        return load_corpus(settings, options.processes)
    if options.stage != PIXEL:
        raise UsageError(f"The stage {options.stage} takes the folder that prepare wrote, found a file {options.data}.")
    return load_packed(settings)


def train(options: argparse.Namespace, corpus: Any, settings: TrainSettings) -> None:
    """Runs a stage and writes its averaged weights and its record."""
    stage, until = options.stage, options.until
    build, schedule = STAGES[stage]
    task: Task = build(corpus, settings)
    if until is not None:  # loading has used some of the time
        settings = replace(settings, stop_after=max(0.0, until - time.time()))
    fitted = fit(task, schedule, settings, stage)
    if settings.rank:
        return
    module: Any = task.module
    shared = settings.weights / "shared"
    extra: dict[str, Any] = {}
    if stage == pair.NAME:
        from safetensors.torch import save_file

        write_text_encoder(module["text"].cpu().eval(), shared / "text_encoder")
        (shared / "picture_encoder").mkdir(parents=True, exist_ok=True)
        state = {name: value.cpu().contiguous() for name, value in module["picture"].state_dict().items()}
        save_file(state, shared / "picture_encoder" / "model.safetensors")
    elif stage == autoencoder.NAME:
        extra = autoencoder.finish_autoencoder(task, corpus, settings)  # type: ignore[arg-type]
    elif stage == PIXEL:
        from edadm_cli.models.emoji.train.pixel_model import finish_pixels

        module.to(memory_format=torch.contiguous_format)
        extra = finish_pixels(module, corpus, settings, options.pictures if fitted.done else 0)
    else:
        module.to(memory_format=torch.contiguous_format)
        module.save_pretrained(settings.weights / stage / ("transformer" if stage == TRANSFORMER else "unet"))
    record = record_of(corpus, settings, schedule, fitted, module, extra)
    write_json(settings.out / "records" / f"{stage}.json", record)
    if stage == PIXEL:
        write_json(settings.weights / stage / "training.json", record)


def record_of(
    corpus: Pictures, settings: TrainSettings, schedule: Schedule, fitted: FitResult, module: Any, extra: dict[str, Any]
) -> dict[str, Any]:
    """Returns a stage's training record."""
    cuda = settings.device.type == "cuda"
    batch = settings.batch_size or schedule.batch_size
    return {
        "seed": settings.seed,
        "pictures": len(corpus.train),
        "held_out_pictures": len(corpus.held_out),
        "schedule": vars(schedule) | {"batch_size": batch},
        "finished": fitted.done,
        "steps": fitted.steps,
        "epochs": round(fitted.steps * batch / len(corpus.train), 1),
        "seconds": round(fitted.seconds, 1),
        "final_loss": fitted.loss,
        "parameters": sum(value.numel() for value in module.parameters()),
        "machine": f"{settings.world} x {torch.cuda.get_device_name()}" if cuda else f"{platform.machine()} CPU",
        "precision": "bfloat16 autocast" if cuda else "float32",
        "versions": {name: _version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "measurements": extra,
        "curve": fitted.curve,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def run(options: argparse.Namespace, corpus: Any, settings: TrainSettings) -> None:
    """Runs one stage."""
    if options.stage in STAGES:
        train(options, corpus, settings)
    elif options.stage == "package":
        from edadm_cli.models.emoji.train.package import package

        package(corpus, settings, options.ship)
    elif options.stage != "pixels":
        from edadm_cli.models.emoji.train.results import measure, show

        (show if options.stage == "sheets" else measure)(corpus, settings, options)
    elif options.pack is not None:
        pack(corpus, (settings.data / CARD).read_bytes(), options.pack)


def main() -> int:
    """Runs one stage, and returns the exit code."""
    options = build_parser().parse_args()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    try:
        settings = settings_of(options)
        run(options, load(options, settings), settings)
    except EdadmError as error:
        print(f"{error.message}\n{error.hint or ''}".rstrip(), file=sys.stderr)
        return error.exit_code
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
