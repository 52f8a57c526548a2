"""Full-size architectures with seeded random weights, built offline: for speed, memory and plumbing without a download.

Every weight matrix is drawn from a normal distribution with standard deviation 1 / sqrt(fan-in), norms lie around the
identity, and no output layer is zero, so that activations keep a scale of about one through the whole network and
nothing collapses under quantization as it would with the zeros that networks are trained from.
"""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edadm_cli.models.architecture import Architecture, find_class, load_architecture
from edadm_cli.models.example_calls import example_call
from edadm_cli.models.quiet import quiet_libraries
from edadm_cli.models.tokenizers import clip_tokenizer, letter_tokenizer

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["SUFFIX", "WEIGHTS_VERSION", "build_denoiser", "build_random_pipeline", "example_call", "initialize"]

SUFFIX = "-random"
WEIGHTS_VERSION = 1
"""Changes whenever the same seed would give other weights."""

# The 24 layers of T5-XXL hold 4.7 billion parameters; two give states of the same shape.
_CUT = {"T5EncoderModel": {"num_layers": 2}}
_QUERY_GAIN = 2.0  # attention with unit logits would average everything away
_SPREAD = 0.1  # of biases, and of norms around the identity


def build_denoiser(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Build the denoiser of a known model with random weights, in eval mode.

    Args:
        name: An architecture such as `sd15`, or the model `sd15-random`.
        seed: Seed of the weights; neither the number of threads nor the element type changes what is drawn.
        dtype: Element type of the weights.
    """
    architecture = load_architecture(name.removesuffix(SUFFIX))
    return _build_module(architecture, architecture.denoiser_name, seed, dtype)


def build_random_pipeline(architecture: Architecture, seed: int, dtype: torch.dtype) -> DiffusionPipeline:
    """Build a whole pipeline with random weights: denoiser, text encoders, autoencoder, scheduler, tokenizers."""
    with quiet_libraries():
        parts = {name: _build_component(architecture, name, seed, dtype) for name in architecture.components}
        return find_class(architecture.pipeline)(**architecture.options, **parts)


@torch.no_grad()
def initialize(module: nn.Module, seed: int) -> None:
    """Draw every parameter of a module, each from a generator of its own."""
    owners = dict(module.named_modules())
    for name, parameter in module.named_parameters():
        owner, _, own = name.rpartition(".")
        generator = torch.Generator().manual_seed(_seed_of(name, seed))
        values = torch.empty(parameter.shape).normal_(generator=generator)
        parameter.copy_(_scale_(values, owners[owner], owner, own))


def _build_component(architecture: Architecture, name: str, seed: int, dtype: torch.dtype) -> Any:
    cls = architecture.component_class(name)
    if issubclass(cls, nn.Module):
        return _build_module(architecture, name, seed, dtype)
    config = architecture.config(name)
    if hasattr(cls, "set_timesteps"):
        return cls(**config)
    return clip_tokenizer(**config) if cls.__name__.startswith("CLIP") else letter_tokenizer(**config)


def _build_module(architecture: Architecture, name: str, seed: int, dtype: torch.dtype) -> nn.Module:
    from accelerate import init_empty_weights

    cls = architecture.component_class(name)
    with init_empty_weights(include_buffers=False):  # no time is spent on weights that are drawn anew
        module: nn.Module = _construct(cls, architecture.config(name))
    for owner in module.modules():
        for own, parameter in owner.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=dtype)
            setattr(owner, own, nn.Parameter(empty, requires_grad=False))
    tie: Any = getattr(module, "tie_weights", None)
    if tie is not None:
        tie()
    initialize(module, _seed_of(name, seed))
    return module.eval()


def _construct(cls: Any, config: dict[str, Any]) -> nn.Module:
    from transformers import PreTrainedModel

    module: nn.Module
    if issubclass(cls, PreTrainedModel):
        module = cls(cls.config_class(**{**config, **_CUT.get(cls.__name__, {})}))
    else:
        module = cls(**config)
    return module


def _scale_(values: Tensor, owner: nn.Module, path: str, name: str) -> Tensor:
    """Bring standard normal values, in place, to the scale of the parameter `name` of a module."""
    if values.ndim < 2:
        is_norm_weight = name == "weight" and "norm" in type(owner).__name__.lower()
        return values.mul_(_SPREAD).add_(1.0 if is_norm_weight else 0.0)
    if isinstance(owner, nn.Embedding):
        return values
    gain = _QUERY_GAIN if path.endswith(("to_q", "q_proj")) else 1.0
    if path.endswith("SelfAttention.q"):  # T5 does not divide its logits by sqrt(head size), here 64
        gain = _QUERY_GAIN / 8.0
    return values.mul_(gain / values[0].numel() ** 0.5)


def _seed_of(name: str, seed: int) -> int:
    return int.from_bytes(sha256(f"{seed}:{name}".encode()).digest()[:4], "big")
