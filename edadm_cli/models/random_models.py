"""Builds full-size architectures with seeded random weights, to measure speed and memory without a download.

Every weight matrix has nearly normal values with the standard deviation 1 / sqrt(fan-in). They are the same on every
device and, up to rounding, in every element type; a model is created on its device in its element type. Norms are close
to the identity and no output layer is zero, so that activations keep a scale of about one through the whole network and
quantization meets no layer of zeros, as untrained networks have.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edadm_cli.models.architecture import Architecture, find_class, load_architecture
from edadm_cli.models.example_calls import example_call
from edadm_cli.models.quiet import quiet_libraries
from edadm_cli.models.random_numbers import fill_nearly_normal
from edadm_cli.models.stored import Reader
from edadm_cli.models.tokenizers import byte_tokenizer, clip_tokenizer, letter_tokenizer

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["SUFFIX", "build_denoiser", "build_random_pipeline", "example_call", "initialize"]

SUFFIX = "-random"

# Encoders of prompts and images have up to eight billion parameters; a few layers give states of the same shape. Texts
# are split into letters or bytes, so that a small vocabulary suffices.
_WORDS = 1024
_CUT: dict[str, dict[str, Any]] = {
    "T5EncoderModel": {"num_layers": 2},
    "UMT5EncoderModel": {"num_layers": 2, "vocab_size": _WORDS},
    "Gemma2Model": {"num_hidden_layers": 2, "vocab_size": _WORDS},
    "Qwen3Model": {"num_hidden_layers": 2, "vocab_size": _WORDS},
    "Qwen3ForCausalLM": {"num_hidden_layers": 28, "intermediate_size": 512, "vocab_size": _WORDS},  # FLUX.2 reads 27
    "Qwen2_5_VLForConditionalGeneration": {
        "text_config": {"num_hidden_layers": 2, "vocab_size": _WORDS},
        "vision_config": {"depth": 2},
        "image_token_id": 1,
        "video_token_id": 2,
        "vision_start_token_id": 3,
        "vision_end_token_id": 4,
    },
    "CLIPVisionModelWithProjection": {"num_hidden_layers": 2},
}
_QUERY_GAIN = 2.0  # attention with unit logits would average everything away
_CPU = torch.device("cpu")
_SPREAD = 0.1  # of biases, and of norms around the identity


def build_denoiser(
    name: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device = _CPU,
    changes: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Builds the denoiser of a known model with random weights, in eval mode.

    Args:
        name: An architecture such as `sd15`, or the model `sd15-random`.
        seed: Seed of the weights.
        dtype: Element type of the weights.
        device: The device of the weights.
        changes: Fields of the configuration that differ from the model's, such as fewer layers.
    """
    architecture = load_architecture(name.removesuffix(SUFFIX))
    return _build_module(architecture, architecture.denoiser_name, seed, dtype, device, changes or {})


def build_random_pipeline(
    architecture: Architecture,
    seed: int,
    dtype: torch.dtype,
    device: torch.device = _CPU,
    ready: Mapping[str, nn.Module] | None = None,
) -> DiffusionPipeline:
    """Builds a whole pipeline with random weights: denoiser, text encoders, autoencoder, scheduler, tokenizers.

    Args:
        architecture: What is built.
        seed: Seed of the weights.
        dtype: Element type of the weights.
        device: Where they are made.
        ready: Components that are there already, by name.
    """
    parts: dict[str, Any] = dict(ready or {})
    with quiet_libraries():
        for name in architecture.components:
            if name not in parts:
                parts[name] = _build_component(architecture, name, seed, dtype, device)
        return find_class(architecture.pipeline)(**architecture.options, **parts)


@torch.no_grad()
def initialize(module: nn.Module, seed: int) -> None:
    """Fills every parameter of a module, each with a seed of its own."""
    owners = dict(module.named_modules())
    for name, parameter in module.named_parameters():
        owner, _, last = name.rpartition(".")
        gain, mean = _spread(parameter, owners[owner], owner, last)
        fill_nearly_normal(parameter, _seed_of(name, seed), gain, mean)


def random_readers(module: nn.Module, architecture: Architecture, seed: int) -> dict[str, Reader]:
    """Returns a function for each parameter of an architecture's denoiser that creates it as `build_denoiser` does.

    Args:
        module: The denoiser; its parameters may be on the `meta` device.
        architecture: Its architecture.
        seed: Seed of the weights.
    """
    owners, own_seed = dict(module.named_modules()), _seed_of(architecture.denoiser_name, seed)
    readers: dict[str, Reader] = {}
    for name, parameter in module.named_parameters():
        owner, _, last = name.rpartition(".")
        gain, mean = _spread(parameter, owners[owner], owner, last)
        readers[name] = partial(_made, parameter.shape, _seed_of(name, own_seed), gain, mean)
    return readers


def random_bytes(architecture: Architecture, dtype: torch.dtype) -> dict[str, int]:
    """Returns the bytes of the weights of each component of an architecture; nothing is built in memory."""
    from accelerate import init_empty_weights

    sizes = {}
    for name in architecture.components:
        cls = architecture.component_class(name)
        if issubclass(cls, nn.Module):
            with quiet_libraries(), init_empty_weights():
                module = _construct(cls, architecture.config(name))
            sizes[name] = dtype.itemsize * sum(parameter.numel() for parameter in module.parameters())
    return sizes


def _made(shape: torch.Size, seed: int, gain: float, mean: float, device: torch.device, dtype: torch.dtype) -> Tensor:
    values = torch.empty(shape, device=device, dtype=dtype)
    fill_nearly_normal(values, seed, gain, mean)
    return values


def _build_component(architecture: Architecture, name: str, seed: int, dtype: torch.dtype, device: torch.device) -> Any:
    cls = architecture.component_class(name)
    if issubclass(cls, nn.Module):
        return _build_module(architecture, name, seed, dtype, device, {})
    config = architecture.config(name)
    if hasattr(cls, "set_timesteps") or cls.__name__.endswith("ImageProcessor"):
        return cls(**config)
    if cls.__name__.startswith("Qwen"):
        return byte_tokenizer(**config)
    return clip_tokenizer(**config) if cls.__name__.startswith("CLIP") else letter_tokenizer(**config)


def _build_module(
    architecture: Architecture,
    name: str,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    changes: Mapping[str, Any],
) -> nn.Module:
    """Builds one component with random weights, in eval mode; `changes` replaces fields of its configuration."""
    from accelerate import init_empty_weights

    cls = architecture.component_class(name)
    with init_empty_weights(include_buffers=False):  # the weights are initialized later
        module: nn.Module = _construct(cls, {**architecture.config(name), **changes})
    for owner in module.modules():
        for key, parameter in owner.named_parameters(recurse=False):
            empty = torch.empty(parameter.shape, dtype=dtype, device=device)
            setattr(owner, key, nn.Parameter(empty, requires_grad=False))
    tie: Any = getattr(module, "tie_weights", None)
    if tie is not None:
        tie()
    initialize(module, _seed_of(name, seed))
    return module.to(device).eval()  # buffers were created on the CPU


def _construct(cls: Any, config: dict[str, Any]) -> nn.Module:
    from transformers import PreTrainedModel

    module: nn.Module
    if issubclass(cls, PreTrainedModel):
        module = cls(cls.config_class(**_with_cuts(config, _CUT.get(cls.__name__, {}))))
    else:
        module = cls(**config)
    return module


def _with_cuts(config: dict[str, Any], cuts: dict[str, Any]) -> dict[str, Any]:
    """Returns a configuration with other values in some of its fields, also in those that are configurations."""
    changed = {
        name: {**config.get(name, {}), **value} if isinstance(value, dict) else value for name, value in cuts.items()
    }
    return {**config, **changed}


def _spread(parameter: Tensor, owner: nn.Module, path: str, name: str) -> tuple[float, float]:
    """Returns the standard deviation and the mean of the parameter `name` of a module."""
    if parameter.ndim < 2:
        is_norm_weight = name == "weight" and "norm" in type(owner).__name__.lower()
        return _SPREAD, 1.0 if is_norm_weight else 0.0
    if isinstance(owner, nn.Embedding):
        return 1.0, 0.0
    gain = _QUERY_GAIN if path.endswith(("to_q", "q_proj")) else 1.0
    if path.endswith("SelfAttention.q"):  # T5 does not divide its logits by sqrt(head size), here 64
        gain = _QUERY_GAIN / 8.0
    return gain / parameter[0].numel() ** 0.5, 0.0


def _seed_of(name: str, seed: int) -> int:
    return int.from_bytes(sha256(f"{seed}:{name}".encode()).digest()[:4], "big")
