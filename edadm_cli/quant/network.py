"""Replaces the layers of a whole denoiser by quantized ones, sets and reads their parameters, and counts them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from edadm_cli.errors import InputError
from edadm_cli.quant.attention import OPERANDS, QuantizedAttention
from edadm_cli.quant.groups import codes_of
from edadm_cli.quant.layers import LayerProduct, QuantizedLayer, quantized_layer, quantized_layers
from edadm_cli.quant.plan import QuantizationPlan, part_name
from edadm_cli.quant.split_layer import SplitLayer
from edadm_cli.quant.storage import stored_bits


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` in the place of the submodule with dotted name `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def set_processor(attention: nn.Module, processor: object) -> None:
    """Replaces the processor of a diffusers attention module; either may be a module or a plain object."""
    attention._modules.pop("processor", None)  # a processor that is a module would hide one that is not
    attention.processor = processor  # type: ignore[assignment]


def quantize_network(
    model: nn.Module,
    plan: QuantizationPlan,
    code_bits: Callable[[int], int] = stored_bits,
    device: torch.device | None = None,
) -> None:
    """Replaces every planned layer and attention processor of `model` by an empty quantized one, in place.

    Args:
        model: The denoiser in full precision.
        plan: Bits of every layer and attention.
        code_bits: Returns the bits that a code takes in memory and on disk, for its number of bits.
        device: The device of the quantized layers; by default that of the weights, which have to be in memory then.

    Raises:
        InputError: The plan names a layer that the model does not have, or that cannot be quantized.
    """
    modules = dict(model.named_modules())
    for name, layer_plan in plan.layers.items():
        if name not in modules:
            raise InputError(f"The plan names the layer '{name}', which {type(model).__name__} does not have.")
        try:
            set_module(model, name, quantized_layer(modules[name], layer_plan, code_bits, device))
        except TypeError as error:
            raise InputError(f"The layer '{name}' cannot be quantized: {error}.") from error
    for name, attention_plan in plan.attentions.items():
        if name not in modules:
            raise InputError(f"The plan names the attention '{name}', which {type(model).__name__} does not have.")
        place = device or next(modules[name].parameters()).device
        set_processor(modules[name], QuantizedAttention(attention_plan).to(place))


def deploy(model: nn.Module, product: LayerProduct | None) -> None:
    """Makes every quantized layer multiply its codes by `product`; with `None` it quantizes and dequantizes again."""
    with torch.no_grad():
        for layer in quantized_layers(model).values():
            layer.deploy(product)
        if product is not None:
            product.join(model)


def quant_params(model: nn.Module) -> dict[str, Tensor]:
    """Returns the quantization parameters of a quantized model under the names of `quant_params.safetensors`."""
    params = {
        f"{name}.{key}": tensor.detach()
        for name, layer in quantized_layers(model).items()
        for key, tensor in layer.parameters_by_name()
    }
    for name, attention in _attentions(model).items():
        for operand in OPERANDS:
            params[f"{name}.{operand}_scale"] = getattr(attention, f"{operand}_scale").detach()
    return params


def load_quant_params(model: nn.Module, params: Mapping[str, Tensor]) -> None:
    """Fills a model made by `quantize_network` with the tensors of `quant_params`, layer by layer.

    Args:
        model: The model.
        params: The tensors by name. Each is asked for once, so that a mapping may read them from a file.

    Raises:
        InputError: A tensor is missing, left over, misshapen, not finite, or a code does not fit its bits.
    """
    layers, attentions = quantized_layers(model), _attentions(model)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, layer in layers.items():
        shapes[name] = {f"{name}.{key}": shape for key, shape in layer.parameter_shapes().items()}
        if layer.bias is not None and f"{name}.bias" in params:
            shapes[name][f"{name}.bias"] = tuple(layer.bias.shape)
    for name in attentions:
        shapes[name] = {f"{name}.{operand}_scale": () for operand in OPERANDS}
    expected = {name for layer_shapes in shapes.values() for name in layer_shapes}
    missing, extra = sorted(expected - params.keys()), sorted(params.keys() - expected)
    if missing or extra:
        what, name = ("lack", missing[0]) if missing else ("hold an unknown tensor", extra[0])
        raise InputError(f"The quantization parameters {what} '{name}' ({len(missing) + len(extra)} in all).")
    for name, layer in layers.items():
        fill_layer(layer, name, _read(params, shapes[name]))
        require_sound(name, layer)
    for name, attention in attentions.items():
        scales = _read(params, shapes[name])
        for operand in OPERANDS:
            getattr(attention, f"{operand}_scale").copy_(scales[f"{name}.{operand}_scale"].reshape(()))
        require_sound(name, attention)


def _read(params: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Returns some tensors, whose shapes are checked."""
    tensors = {name: params[name] for name in shapes}
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name]:
            raise InputError(f"'{name}' has shape {list(tensor.shape)}, expected is {list(shapes[name])}.")
    return tensors


def fill_layer(layer: QuantizedLayer | SplitLayer, name: str, params: Mapping[str, Tensor]) -> None:
    """Sets the parameters of one layer, or of its parts, from the tensors of `quant_params`.

    Args:
        layer: A layer from `quantized_layer`.
        name: Its name in the denoiser.
        params: Tensors by full name; a `<layer>.bias` among them is a corrected bias.

    Raises:
        InputError: A code does not fit its bits.
    """
    parts: list[nn.Module] = list(layer.parts) if isinstance(layer, SplitLayer) else [layer]
    names = [part_name(name, index) for index in range(len(parts))] if isinstance(layer, SplitLayer) else [name]
    for full_name, part in zip(names, parts, strict=True):
        assert isinstance(part, QuantizedLayer)
        device = part.weight_codes.device  # packing and checking are quick there
        tensors = {key: params[f"{full_name}.{key}"].to(device) for key in part.parameter_shapes()}
        codes, grid, size = tensors["weight_int"], part.plan.weight_grid, part.plan.group_size
        if size is not None:
            codes = codes_of(codes, tensors["weight_multiplier"], size)
        if codes.min() < grid.quant_min or codes.max() > grid.quant_max:  # packing would wrap them around
            raise InputError(f"'{full_name}.weight_int' has codes outside {grid.quant_min}..{grid.quant_max}.")
        part.set_parameters(**tensors, bias=params.get(f"{full_name}.bias"))


def require_sound(name: str, module: QuantizedLayer | QuantizedAttention) -> None:
    """Checks the tensors of a filled layer or attention.

    Raises:
        InputError: A scale is not a positive number, or a code or zero-point does not fit its bits.
    """
    for key, buffer in module.named_buffers(recurse=False):
        if key.endswith("_scale") and not bool((torch.isfinite(buffer) & (buffer > 0)).all()):
            raise InputError(f"'{name}.{key}' has a scale that is not a positive number.")
    if not isinstance(module, QuantizedLayer):
        return
    grid = module.plan.input_grid
    if grid is not None and not grid.quant_min <= int(module.input_zero_point) <= grid.quant_max:
        raise InputError(f"'{name}' has a zero-point outside {grid.quant_min}..{grid.quant_max}.")
    allowed = module.plan.weight_grid
    # Otherwise every code that can be stored is on the grid, as is every multiplier; formats before 3 have no groups.
    if module.code_bits > allowed.num_bits:
        codes = module.weight_int
        if codes.min() < allowed.quant_min or codes.max() > allowed.quant_max:
            raise InputError(f"'{name}.weight_int' has codes outside {allowed.quant_min}..{allowed.quant_max}.")
    if module.bias is not None and not bool(torch.isfinite(module.bias).all()):
        raise InputError(f"'{name}.bias' is not finite.")


def unquantized(model: nn.Module, plan: QuantizationPlan) -> list[str]:
    """Returns the names that are planned but not quantized in `model`; this is the coverage check."""
    modules = dict(model.named_modules())
    attentions = _attentions(model)
    layers = [name for name in plan.layers if not isinstance(modules.get(name), QuantizedLayer | SplitLayer)]
    return layers + [name for name in plan.attentions if name not in attentions]


def _attentions(model: nn.Module) -> dict[str, QuantizedAttention]:
    return {
        name: module.processor
        for name, module in model.named_modules()
        if isinstance(getattr(module, "processor", None), QuantizedAttention)
    }
