r"""Quantizes the weights of text encoders to 8 bits with torchao.

    w' = s q,   s = max |w| / 127,   q = round(w / s)

The weights are rounded to nearest, with one scale s per output channel. Only the weights of linear layers are
quantized. Embeddings, norms, biases and all activations are left in float. transformers saves the encoder as
safetensors, and `DiffusionPipeline.from_pretrained` loads it if torchao is installed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from edadm_cli.artifacts import TextEncoder
from edadm_cli.artifacts.files import atomic_path
from edadm_cli.errors import MachineError, UsageError
from edadm_cli.export.sizes import exact_narrow, stored_bytes
from edadm_cli.hooks import Hooks
from edadm_cli.models.families import Call
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.models.quiet import quiet_libraries

PACKAGE = "torchao"
_CODE = "_qdata"
"""The end of the name under which torchao stores the codes of a weight."""


def require_package() -> None:
    """Checks that torchao is installed.

    Raises:
        MachineError: It is not installed.
    """
    if find_spec(PACKAGE) is None:
        raise MachineError(
            f"--text-encoders int8 needs the package '{PACKAGE}', which is not installed here.",
            hint=f"pip install {PACKAGE}",
        )


def text_encoders(model: LoadedModel) -> dict[str, nn.Module]:
    """Returns the text encoders of a pipeline by name: models of transformers with `text_encoder` in their names."""
    from transformers import PreTrainedModel

    components = model.pipeline.components.items()
    return {name: part for name, part in components if "text_encoder" in name and isinstance(part, PreTrainedModel)}


@contextmanager
def recorded_calls(model: LoadedModel) -> Iterator[dict[str, Call]]:
    """Returns a context that records the last call of each text encoder, by the encoder's name."""
    calls: dict[str, Call] = {}

    def recorder(name: str) -> Callable[..., None]:
        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[name] = (args, kwargs)

        return record

    with Hooks() as hooks:
        for name, encoder in text_encoders(model).items():
            hooks.before(encoder, recorder(name), with_kwargs=True)
        yield calls


def quantize_text_encoders(model: LoadedModel, calls: Mapping[str, Call]) -> dict[str, TextEncoder]:
    """Replaces the text encoders of a pipeline with ones that have 8-bit weights, and measures the change.

    Args:
        model: The pipeline, changed in place.
        calls: One call of each encoder, by name. No errors are measured for an encoder without a call.

    Returns:
        The record of each encoder, by name. Its `size_mib` is 0, because the encoder is not saved yet.

    Raises:
        MachineError: torchao is not installed.
        UsageError: The pipeline has no text encoder.
    """
    require_package()
    encoders = text_encoders(model)
    if not encoders:
        raise UsageError(f"{type(model.pipeline).__name__} has no text encoder, so --text-encoders has no meaning.")
    outcomes = {}
    for name, encoder in encoders.items():
        quantized = _quantized(encoder)
        call = calls.get(name)
        errors = {} if call is None else _errors(_output(encoder, call), _output(quantized, call))
        outcomes[name] = TextEncoder(
            bits=8,
            layers=sum(is_traceable_wrapper_subclass(parameter) for parameter in quantized.parameters()),
            size_mib=0.0,
            float_mib=stored_bytes(encoder) / 2**20,
            **errors,
        )
        model.pipeline.register_modules(**{name: quantized})
    return outcomes


def narrow_saved(folder: Path) -> None:
    """Rewrites the files of a saved encoder with float tensors in 16 bits, if these hold every value exactly."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        stems = tuple(name.removesuffix(_CODE) for name in tensors if name.endswith(_CODE))
        ready = {
            name: tensor if name.startswith(stems) else tensor.to(exact_narrow(tensor))
            for name, tensor in tensors.items()
        }
        with atomic_path(path) as temporary:
            save_file(ready, temporary, metadata)


def _quantized(encoder: Any) -> nn.Module:
    """Returns the encoder as transformers loads it with torchao's configuration, in float32 where not quantized."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    device = next(encoder.parameters()).device
    # by default torchao sets flags of torch's compiler for the whole process, which this tool must not change
    config = TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
    with quiet_libraries(), tempfile.TemporaryDirectory(prefix="edadm-encoder-") as place:
        encoder.save_pretrained(place)
        quantized: nn.Module = type(encoder).from_pretrained(
            place, quantization_config=config, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
    return quantized.to(device).eval().requires_grad_(False)


@torch.no_grad()
def _output(encoder: nn.Module, call: Call) -> Tensor:
    """Returns the states `[N, L, C]` of an encoder's last layer, in float64."""
    output = encoder(*call[0], **call[1])
    states = getattr(output, "last_hidden_state", None)
    if states is None:
        hidden = getattr(output, "hidden_states", None)
        states = hidden[-1] if hidden else output[0]
    return torch.as_tensor(states).double()


def _errors(expected: Tensor, states: Tensor) -> dict[str, float]:
    """Returns the mean cosine per token and the relative L2 distance of states `[N, L, C]` from those expected."""
    cosine = nn.functional.cosine_similarity(states, expected, dim=-1)
    return {
        "cosine": float(cosine.mean()),
        "rel_l2": float((states - expected).norm() / expected.norm().clamp_min(1e-30)),
    }
