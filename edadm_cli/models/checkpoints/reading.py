"""Reads the tensors of a checkpoint file: safetensors, or a pickle that holds only tensors and plain data."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from edadm_cli.artifacts import read_tensor_header
from edadm_cli.errors import InputError

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", *PICKLES)


class _Inert:
    """Takes the place of a class of another library that a checkpoint mentions but does not need."""


# Checkpoints of PyTorch Lightning mention the classes of their callbacks. They are never instantiated.
_MENTIONED = tuple(
    f"pytorch_lightning.callbacks.{module}.{name}"
    for module, name in (("model_checkpoint", "ModelCheckpoint"), ("early_stopping", "EarlyStopping"))
)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Returns the named tensors of a checkpoint, or those of its entry `state_dict` if it has one.

    Raises:
        InputError: The file is truncated, is not a checkpoint, contains code, or holds no named tensors.
    """
    if path.suffix.lower() == ".safetensors":
        read_tensor_header(path)
        content: Any = load_file(path)
    else:
        content = _read_pickle(path)
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    tensors = {name: value for name, value in (state or {}).items() if isinstance(value, Tensor)}
    if not tensors or not all(isinstance(name, str) for name in tensors):
        raise InputError(f"{path} holds no named tensors, so it is not a checkpoint of a model.")
    return tensors


def inert_globals() -> Any:
    """Returns a context in which a pickle may mention a few known classes, each replaced by one that does nothing."""
    return torch.serialization.safe_globals([(_Inert, name) for name in _MENTIONED])


def _read_pickle(path: Path) -> Any:
    try:
        with inert_globals(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of old pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Weights only load failed" in str(error) and "GLOBAL" in str(error):
            raise InputError(
                f"{path} is a pickle with more in it than tensors and plain data, which could carry code; "
                "it is not read.",
                hint="convert it to .safetensors where its origin is trusted",
            ) from error
        raise InputError(f"{path} is truncated, or is no checkpoint of torch.") from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError, OSError) as error:
        raise InputError(f"{path} is truncated, or is no checkpoint of torch.") from error
