"""Architectures of the known models as data: each component's class and configuration, without weights."""

from __future__ import annotations

import importlib
import json
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

FOLDER = Path(__file__).parent / "architectures"
WEIGHTS_VERSION = 2
"""Number that is raised whenever the same seed gives other random weights."""
DENOISER_NAMES = ("unet", "transformer")
FurtherDenoiser = Literal["transformer_2", "unconditional_transformer"]
FURTHER_DENOISERS: tuple[FurtherDenoiser, ...] = get_args(FurtherDenoiser)
"""Components that denoise besides the first one: at other timesteps (Wan 2.2), or without the prompt (Ideogram 4)."""


class Architecture(BaseModel):
    """A pipeline without its weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pipeline: str = Field(description="class of diffusers")
    options: dict[str, Any] = Field(default_factory=dict, description="constructor arguments that are no components")
    components: dict[str, tuple[str, dict[str, Any]]] = Field(
        description="name -> class with its module, and the configuration it is built from"
    )

    @property
    def denoiser_name(self) -> str:
        """The component that is quantized."""
        return next(name for name in DENOISER_NAMES if name in self.components)

    def component_class(self, name: str) -> Any:
        """Returns the class of a component."""
        return find_class(self.components[name][0])

    def config(self, name: str) -> dict[str, Any]:
        """Returns the configuration of a component."""
        return dict(self.components[name][1])

    def fingerprint(self, seed: int, version: int) -> str:
        """Returns the hash of the architecture, a seed of weights, and the version of the rule that generates them."""
        content = {"architecture": self.model_dump(mode="json"), "seed": seed, "weights": version}
        return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def find_class(path: str) -> Any:
    """Returns a class by its module and name; without a module, a class of diffusers."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module or "diffusers"), name)


@cache
def load_architecture(name: str) -> Architecture:
    """Reads a shipped architecture, such as `sd15`."""
    return Architecture.model_validate_json((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
