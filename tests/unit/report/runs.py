"""Runs with every artifact, written quickly in the layout of the stages, with invented metrics."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

from PIL import Image

from edadm_cli.artifacts import Artifact, BuildSpec, ModelRef, RunFolder, save_json
from edadm_cli.config import BitWidth
from edadm_cli.recipe import Recipe

NUM_SHOWN = 3
PARENTS = {"select": "collect", "reconstruct": "select", "export": "reconstruct", "evaluate": "export"}
WITH_BITS = ("reconstruct", "export", "evaluate")

SAMPLING: dict[str, Any] = {
    "model": {"id": "tiny-model", "revision": None, "fingerprint": "f" * 64},
    "entry": {
        "name": "tiny-model",
        "description": "A model of two layers",
        "source": "folder",
        "location": "tiny-model",
        "denoiser": "UNet2DModel",
        "sampler": "DDIM",
        "num_steps": 4,
    },
    "scheduler": {"class": "DDIMScheduler", "config": {"beta_end": 0.02, "trained_betas": None}},
    "prompts": ["a seven", "a cat", "a seven"],
    "seeds": [0, 1, 2],
    "num_steps": 4,
    "guidance_scale": 2.5,
    "eta": 0.0,
    "dtype": "float32",
}
SELECTION: dict[str, Any] = {
    "strategy": "tdac",
    "num_samples": 3,
    "num_trajectories": 3,
    "density_radius": 0.25,
    "density_radius_source": "given",
    "variety_weight": 1.5,
    "timesteps": [751, 501, 251, 1],
    "counts": [0, 2, 1, 0],
    "density": [0.0, 1.0, 0.5, 0.25],
    "variety": [1.0, 0.0, 0.5, 0.75],
}
UNITS: dict[str, Any] = {
    "units": [
        {"name": "conv_in", "kind": "layer", "layers": ["conv_in"], "loss_before": 0.5, "loss_after": 0.0}
        | {"curve": [0.5, 0.25, 0.0]},
        {"name": "mid", "kind": "residual", "layers": ["mid.a", "mid.b"], "loss_before": 20.0, "loss_after": 4.0}
        | {"curve": [20.0]},
    ],
    "coverage": {"planned": 3, "quantized": 3, "kept": 1},
    "by_kind": {"conv2d": 2, "linear": 1, "attention_products": 2},
    "loss": {"first": 20.5, "last": 4.0},
}
PLAN: dict[str, Any] = {
    "layers": {
        "conv_in": {"weight_bits": 8, "activation_bits": 8},
        "mid.a": {"weight_bits": 4, "activation_bits": 8, "channel_parts": [96, 64]},
        "mid.b": {"weight_bits": 4, "activation_bits": None, "channel_parts": None},
    },
    "attentions": {"mid.attn": {"activation_bits": 8, "probability_bits": 6}},
    "kept": {"mid.skip": "excluded by the recipe's pattern 'mid.s*'"},
}
EXPORT: dict[str, Any] = {
    "denoiser": "unet",
    "size_mib": {"unet": 2.0, "vae": 0.5, "scheduler": 0.0004, "denoiser_fp32": 13.0, "ratio": 6.5},
    "parity": {
        "images_bit_equal": True,
        "latent_max_abs": 0.0,
        "integer_bound": 1e-05,
        "integer_latent_rel_l2": 0.0321,
        "integer_layer": "mid.a",
        "integer_rel_l2": 2.5e-07,
    },
}
EVALUATION: dict[str, Any] = {
    "bits": "w4a8",
    "metrics": {
        "prompt_accuracy": {"value": 0.9875, "features": "digits/logits", "num_images": 80},
        "frechet_distance": {"value": 1.375, "features": "digits/pooled", "num_images": 80},
        "a_new_metric": {"value": 3.0, "features": "somewhere", "num_images": 80},
    },
    "full_precision": {
        "prompt_accuracy": {"value": 1.0, "features": "digits/logits", "num_images": 80},
        "frechet_distance": {"value": 1.125, "features": "digits/pooled", "num_images": 80},
    },
    "distance_to_full_precision": {"psnr_db": 31.25, "latent_rel_l2": 0.0875},
    "num_images": 80,
    "num_identical_images": 2,
    "num_steps": 4,
    "guidance_scale": 2.5,
    "real": "some real images",
    "skipped": {"kid": "no weights", "fid": "no weights"},
    "cautions": ["fid of few images"],
    "shown": [
        {
            "seed": 1000 + place,
            "prompt": f"prompt number {place}",
            "full_precision": f"images/{place}-full.png",
            "quantized": f"images/{place}-quantized.png",
            "psnr_db": 30.0 + place,
            "latent_rel_l2": 0.1,
        }
        for place in range(NUM_SHOWN)
    ],
}
CONFIGS: dict[str, dict[str, Any]] = {
    "collect": {"num_trajectories": 3, "num_steps": 4, "guidance_scale": 2.5, "dtype": "float32"},
    "select": {"strategy": "tdac", "num_samples": 3, "density_radius": 0.25, "variety_weight": 1.5},
    "reconstruct": {"batch_size": 64},
    "export": {"parity_samples": 2},
    "evaluate": {"num_images": 80, "num_steps": 4, "metrics": []},
}


class RunMaker:
    """Writes artifacts into a run folder; `facts` holds the JSON files it writes, to be changed before."""

    def __init__(self, root: Path, model: str = "tiny-model") -> None:
        self.run = RunFolder(root)
        self.model = ModelRef(id=model, fingerprint="f" * 64)
        self.recipe = "default"
        self.brightness = 0
        self.facts: dict[str, dict[str, Any]] = copy.deepcopy(
            {
                "sampling.json": SAMPLING,
                "selection.json": SELECTION,
                "units.json": UNITS,
                "plan.json": PLAN,
                "export.json": EXPORT,
                "model_index.json": {"_class_name": "StableDiffusionPipeline"},
                "evaluation.json": EVALUATION,
            }
        )

    def calibration(self) -> RunMaker:
        """Write `collect` and `select`."""
        self.make("collect")
        self.make("select")
        return self

    def width(self, bits: str) -> RunMaker:
        """Write everything of a bit width."""
        for kind in WITH_BITS:
            self.make(kind, bits)
        return self

    def make(self, kind: str, bits: str | None = None) -> Artifact:
        """Write one artifact."""
        parent = PARENTS.get(kind)
        parents = (self.run.open(parent, bits if parent in WITH_BITS else None),) if parent else ()
        plan = BuildSpec(kind, bits, self._config(kind, bits), 0, parents, self.model)
        files = {
            "collect": ["sampling.json"],
            "select": ["selection.json"],
            "reconstruct": ["units.json", "plan.json"],
            "export": ["export.json", "model_index.json"],
            "evaluate": ["evaluation.json"],
        }
        with self.run.build(plan, force=True) as build:
            for file in files[kind]:
                save_json(build.path / file, self.facts[file])
            if kind == "evaluate":
                self._write_images(build.path, shade=BitWidth.parse(bits or "").activation)
            return build.commit(environment={"device": "cpu", "seconds": 12.5})

    def _config(self, kind: str, bits: str | None) -> dict[str, Any]:
        config = dict(CONFIGS[kind])
        if bits is not None:
            config["bits"] = BitWidth.parse(bits).model_dump()
        if kind == "reconstruct":
            config["recipe"] = Recipe(name=self.recipe).model_dump(mode="json")
        return config

    def _write_images(self, folder: Path, shade: int) -> None:
        for place, entry in enumerate(self.facts["evaluation.json"]["shown"]):
            base = 10 * place + self.brightness
            for kind, level in (("full_precision", base), ("quantized", base + shade)):
                path = folder / entry[kind]
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(png(level))


def png(level: int, size: int = 8) -> bytes:
    """A square of one gray level."""
    buffer = io.BytesIO()
    Image.new("L", (size, size), level).save(buffer, format="PNG")
    return buffer.getvalue()
