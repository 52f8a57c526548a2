"""The command line of the training. It runs the stages in the order in which they depend on each other."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
import transformers

from edadm_cli.errors import EdadmError, InputError, MachineError, UsageError
from edadm_cli.models.digits.data import WEIGHTS
from edadm_cli.models.digits.train.autoencoder import train_autoencoder
from edadm_cli.models.digits.train.classifier import train_classifier
from edadm_cli.models.digits.train.corpus import Corpus, load_corpus
from edadm_cli.models.digits.train.measure import measure_pixels, measure_text_to_image
from edadm_cli.models.digits.train.pixel import train_pixels
from edadm_cli.models.digits.train.record import machine
from edadm_cli.models.digits.train.settings import TrainSettings
from edadm_cli.models.digits.train.text_to_image import train_text_to_image

STAGES: dict[str, Callable[[Corpus, TrainSettings], None]] = {
    "classifier": train_classifier,
    "autoencoder": train_autoencoder,
    "digits-sd": train_text_to_image,
    "digits-ddpm": train_pixels,
}
NEEDS = {
    "classifier": (),
    "autoencoder": ("classifier",),
    "digits-sd": ("classifier", "digits-sd/vae"),
    "digits-ddpm": ("classifier",),
}


def build_parser() -> argparse.ArgumentParser:
    """Builds the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m edadm_cli.models.digits.train",
        description="Train the digits models on MNIST; the same command goes on where a killed one stopped.",
    )
    parser.add_argument("--data", type=Path, help="MNIST .npz: x_train, y_train, x_test, y_test")
    parser.add_argument("--out", type=Path, required=True, help="gets weights/, samples/ and checkpoints/")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(STAGES), help="stages, comma-separated: %(default)s")
    parser.add_argument("--epochs-scale", type=float, default=1.0, help="factor on the numbers of epochs")
    parser.add_argument("--num-images", type=int, default=2000, help="images sampled to measure a model")
    parser.add_argument("--checkpoint-seconds", type=float, default=30.0, help="time between checkpoints")
    parser.add_argument("--no-cuda-graphs", action="store_true", help="launch every kernel singly on CUDA")
    parser.add_argument("--force", action="store_true", help="train again what other settings trained")
    parser.add_argument(
        "--evaluate-only", action="store_true", help="train nothing; measure the shipped models, or --weights"
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="models that --evaluate-only measures")
    return parser


def settings_of(options: argparse.Namespace) -> TrainSettings:
    """Checks the options and turns them into settings."""
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise MachineError("A CUDA device was expected, but torch finds none.", hint="--device cpu")
    if options.epochs_scale <= 0 or options.num_images < 20:
        raise UsageError("--epochs-scale above 0 and --num-images of 20 or more are expected.")
    return TrainSettings(
        out=options.out, device=device, seed=options.seed, epochs_scale=options.epochs_scale,
        num_images=options.num_images, checkpoint_seconds=options.checkpoint_seconds,
        cuda_graphs=not options.no_cuda_graphs, force=options.force,
    )  # fmt: skip


def train(options: argparse.Namespace, settings: TrainSettings) -> None:
    """Runs the stages that the options name."""
    stages = options.only.split(",")
    if unknown := set(stages) - set(STAGES):
        raise UsageError(f"Stages out of {', '.join(STAGES)} are expected, got {', '.join(sorted(unknown))}.")
    if options.data is None:
        raise UsageError("MNIST is expected, but there is no --data.", hint="--data mnist.npz")
    corpus = load_corpus(options.data)
    for name in (name for name in STAGES if name in stages):
        for needed in NEEDS[name]:
            if not (settings.weights / needed / "training.json").is_file():
                raise InputError(
                    f"{name} needs {needed} in {settings.weights}, which is missing.", hint="leave out --only"
                )
        STAGES[name](corpus, settings)
        print(f"{name}: done", file=sys.stderr, flush=True)


def evaluate(options: argparse.Namespace, settings: TrainSettings) -> None:
    """Measures finished models and prints one JSON object."""
    models = options.only.split(",")
    measured: dict[str, object] = {"machine": machine(settings.device), "seed": settings.seed}
    if "digits-sd" in models:
        measured["digits-sd"] = measure_text_to_image(settings, options.weights)
    if "digits-ddpm" in models:
        measured["digits-ddpm"] = measure_pixels(settings, options.weights)
    print(json.dumps(measured, indent=2))


def silence_libraries() -> None:
    """Keeps the progress bars and hints of other libraries off stderr."""
    for logger in (diffusers.utils.logging, transformers.utils.logging):
        logger.set_verbosity_error()
        logger.disable_progress_bar()


def main() -> int:
    """Trains or evaluates, and returns the exit code."""
    options = build_parser().parse_args()
    try:
        settings = settings_of(options)
        torch.backends.cudnn.allow_tf32 = False
        silence_libraries()
        (evaluate if options.evaluate_only else train)(options, settings)
    except EdadmError as error:
        print(f"{error.message}\n{error.hint or ''}".rstrip(), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
