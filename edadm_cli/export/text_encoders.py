r"""Text encoders with 8-bit weights: rounded to nearest by torchao, one scale per output channel, inputs in float.

    w' = s q,   s = max |w| / 127,   q = round(w / s)

Linear layers are quantized; embeddings, norms and biases stay in float. The encoder is saved as safetensors by
transformers, and whoever has torchao installed loads it with `DiffusionPipeline.from_pretrained`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
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
from edadm_cli.models.loading import LoadedModel, quiet_libraries

PACKAGE = "torchao"
_CODE = "_qdata"
"""The end of the name under which torchao stores the codes of a weight."""

Call = tuple[tuple[Any, ...], dict[str, Any]]


def require_package() -> None:
    """Checks that torchao is there.

    Raises:
        MachineError: It is not.
    """
    if find_spec(PACKAGE) is None:
        raise MachineError(
            f"--text-encoders int8 needs the package '{PACKAGE}', which is not installed here.",
            hint=f"pip install {PACKAGE}",
        )


def text_encoders(model: LoadedModel) -> dict[str, nn.Module]:
    """Returns the text encoders of a pipeline by name: networks of transformers whose names say so."""
    from transformers import PreTrainedModel

    components = model.pipeline.components.items()
    return {name: part for name, part in components if "text_encoder" in name and isinstance(part, PreTrainedModel)}


@contextmanager
def recorded_calls(model: LoadedModel) -> Iterator[dict[str, Call]]:
    """Records the last call of each text encoder while entered."""
    calls: dict[str, Call] = {}

    def recorder(name: str) -> Any:
        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[name] = (args, kwargs)

        return record

    handles = [
        encoder.register_forward_pre_hook(recorder(name), with_kwargs=True)
        for name, encoder in text_encoders(model).items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def quantize_text_encoders(model: LoadedModel, calls: Mapping[str, Call]) -> dict[str, TextEncoder]:
    """Replaces the text encoders of a pipeline by ones with 8-bit weights, and says what that changes.

    Args:
        model: The pipeline, changed in place.
        calls: A call of each encoder, by name; an encoder that was not called has no errors.

    Returns:
        What happened to each encoder; its `size_mib` is that of `saved_text_encoders`.

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
    """Stores in 16 bits what a saved encoder has in float, where they hold every value exactly."""
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
    """The encoder as transformers loads it with torchao's configuration, in float32 where it is not quantized."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    device = next(encoder.parameters()).device
    # the option sets flags of torch's compiler for the whole process, which are not ours to set
    config = TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))
    with quiet_libraries(), tempfile.TemporaryDirectory(prefix="edadm-encoder-") as place:
        encoder.save_pretrained(place)
        quantized: nn.Module = type(encoder).from_pretrained(
            place, quantization_config=config, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
    return quantized.to(device).eval().requires_grad_(False)


@torch.no_grad()
def _output(encoder: nn.Module, call: Call) -> Tensor:
    """The states `[N, L, C]` that an encoder's last layer gives."""
    output = encoder(*call[0], **call[1])
    states = getattr(output, "last_hidden_state", None)
    hidden = getattr(output, "hidden_states", None)
    states = hidden[-1] if states is None and hidden else output[0] if states is None else states
    return torch.as_tensor(states).double()


def _errors(expected: Tensor, states: Tensor) -> dict[str, float]:
    cosine = nn.functional.cosine_similarity(states, expected, dim=-1)
    return {
        "cosine": float(cosine.mean()),
        "rel_l2": float((states - expected).norm() / expected.norm().clamp_min(1e-30)),
    }
