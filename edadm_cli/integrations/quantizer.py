"""The diffusers quantizer of exported denoisers.

It creates the quantized layers before the weights are read. Scales stay in float32, whatever dtype the pipeline is
loaded with.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from pydantic import ValidationError
from torch import Tensor, nn

from edadm_cli.errors import InputError
from edadm_cli.integrations.deployment import make_ready
from edadm_cli.quant.attention import QuantizedAttention
from edadm_cli.quant.layers import QuantizedLayer
from edadm_cli.quant.network import quantize_network, require_sound
from edadm_cli.quant.plan import QuantizationPlan
from edadm_cli.quant.storage import stored_bits, stored_bits_of_format_1

METHOD = "edadm"
_FORMATS: dict[int, Callable[[int], int]] = {1: stored_bits_of_format_1, 2: stored_bits, 3: stored_bits}


class _Method(StrEnum):
    EDADM = METHOD  # equals and hashes as the plain string that diffusers looks up


class EdadmConfig(QuantizationConfigMixin):
    """`quantization_config` of an exported denoiser.

    Args:
        format_version: The version of the tensors' names and packing.
        bits: The bit width, such as `w4a8`.
        recipe: The name of the recipe that the denoiser was quantized with.
        plan: `QuantizationPlan` as plain data.
    """

    def __init__(self, format_version: int, bits: str, recipe: str, plan: dict[str, Any], **_: Any) -> None:
        self.quant_method = _Method.EDADM
        self.format_version, self.bits, self.recipe, self.plan = format_version, bits, recipe, plan

    def to_dict(self) -> dict[str, Any]:
        """Returns the configuration as plain data, as it is in `config.json`."""
        return {
            "quant_method": METHOD,
            "format_version": self.format_version,
            "bits": self.bits,
            "recipe": self.recipe,
            "plan": self.plan,
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}(bits={self.bits!r}, recipe={self.recipe!r}, {len(self.plan['layers'])} layers)"

    def quantization_plan(self) -> QuantizationPlan:
        """Returns the plan, checked.

        Raises:
            InputError: The plan was written by a newer version, or it is not valid.
        """
        if self.format_version not in _FORMATS:
            raise InputError(
                f"The export has format {self.format_version}; this version of edadm reads formats up to"
                f" {max(_FORMATS)}.",
                hint="pip install --upgrade edadm",
            )
        try:
            return QuantizationPlan.model_validate(self.plan)
        except ValidationError as error:
            raise InputError(f"quantization_config holds no valid plan: {error.errors()[0]['msg']}.") from error


class EdadmQuantizer(DiffusersQuantizer):
    """Loads exported denoisers for `from_pretrained`, saves them again for `save_pretrained`."""

    requires_calibration = True

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **_: Any
    ) -> bool:
        """Returns whether a tensor belongs to the quantization: a code, a scale or a zero-point, but not a bias."""
        owner, name = _owner(model, param_name)
        return isinstance(owner, QuantizedLayer | QuantizedAttention) and name in owner._buffers

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device | str,
        state_dict: dict[str, Any],
        *_: Any,
        **__: Any,
    ) -> None:
        """Sets a tensor as it is in the file, since diffusers has cast `param_value` to the dtype of the load."""
        owner, name = _owner(model, param_name)
        stored = state_dict[param_name]
        _require_fit(param_name, stored, owner._buffers[name])
        owner._buffers[name] = stored.to(target_device)

    def check_quantized_param_shape(self, param_name: str, current_param: Tensor, loaded_param: Tensor) -> bool:
        """Returns `True`: `create_quantized_param` checks the shapes."""
        return True

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """Refuses a file that lacks tensors, which diffusers would leave uninitialized."""
        if missing_keys:
            raise InputError(f"The exported weights lack {len(missing_keys)} tensors, such as '{missing_keys[0]}'.")
        return missing_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        settings = self.quantization_config
        quantize_network(model, settings.quantization_plan(), _FORMATS[settings.format_version])
        config: Any = model.config
        config["quantization_config"] = self.quantization_config

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLayer | QuantizedAttention):
                require_sound(name, module)
        make_ready(model)
        return model

    @property
    def is_serializable(self) -> bool:
        """Returns true, because `save_pretrained` writes the packed tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Returns false, because deployed layers have no gradients."""
        return False


def _owner(model: nn.Module, tensor_name: str) -> tuple[nn.Module, str]:
    owner, _, name = tensor_name.rpartition(".")
    return model.get_submodule(owner), name


def _require_fit(name: str, stored: Tensor, expected: Tensor | None) -> None:
    assert expected is not None
    if stored.shape != expected.shape or stored.dtype != expected.dtype:
        raise InputError(
            f"'{name}' is {stored.dtype} {list(stored.shape)} in the export;"
            f" {expected.dtype} {list(expected.shape)} was expected."
        )
