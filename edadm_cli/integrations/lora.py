r"""LoRA on a quantized denoiser: a side branch in floating point beside the layer's integers.

    y = Q(x) + scaling * B (A x)

Q is the quantized layer as it was exported. A multiplies the layer's input before it is quantized. No code and no range
changes, so an adapter can be loaded, weighted, exchanged and unloaded at any time. PEFT does all of that; this module
registers how PEFT wraps a layer without a float weight.

References:
    LoRA, arXiv 2106.09685.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edadm_cli.artifacts.tensors import load_tensors
from edadm_cli.errors import InputError, UsageError
from edadm_cli.integrations.kohya import in_diffusers_names, needs_renaming
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.models.sources.from_folder import first_sentence
from edadm_cli.quant.layers import QuantizedLayer
from edadm_cli.quant.split_layer import SplitLayer


def load_loras(model: LoadedModel, files: Mapping[str | Path, float]) -> None:
    """Loads adapters into a pipeline, each under the name of its file (`adapter_name`), and sets their weights.

    Args:
        model: The pipeline.
        files: safetensors files, each with its weight.

    Raises:
        InputError: A file is not a LoRA, or it belongs to another model.
        UsageError: The pipeline takes no LoRA, two files have the same name, or PEFT is not installed.
    """
    names = {adapter_name(Path(file)): file for file in files}
    if len(names) < len(files):
        raise UsageError("Two LoRA files have the same name, which would be the name of both adapters: rename one.")
    for name, file in names.items():
        load_lora_file(model.pipeline, Path(file), name)
    if files:
        pipeline: Any = model.pipeline
        pipeline.set_adapters(list(names), adapter_weights=list(files.values()))


def adapter_name(file: Path) -> str:
    """Returns the name of a file's adapter: that of the file without `.safetensors`, with `_` for each other dot.

    PEFT makes the name a part of the names of modules, which hold no dots.
    """
    return file.stem.replace(".", "_")


def require_safetensors(path: Path) -> None:
    """Checks that a LoRA file exists and has the suffix of safetensors: other formats can run code when they are read.

    Raises:
        InputError: There is no such file, or it has another suffix.
    """
    if not path.is_file():
        raise InputError(f"There is no LoRA file {path}.")
    if path.suffix != ".safetensors":
        raise InputError(
            f"{path} is not a safetensors file, and other LoRA files are not read, because they can run code.",
            hint=f"safetensors.torch.save_file(torch.load('{path.name}', weights_only=True), 'NAME.safetensors')",
        )


def load_lora_file(pipeline: Any, path: Path, adapter: str) -> None:
    """Loads one adapter from a safetensors file.

    Raises:
        InputError: The file is not a LoRA, or it belongs to another model.
        UsageError: The pipeline takes no LoRA, or PEFT is not installed.
    """
    kind = type(pipeline).__name__
    if not hasattr(pipeline, "load_lora_weights"):
        raise UsageError(f"{kind} takes no LoRA.")
    require_safetensors(path)
    tensors = load_tensors(path)
    broken = next((name for name, tensor in tensors.items() if not _is_finite(tensor)), None)
    if broken is not None:
        raise InputError(f"{path} is damaged: '{broken}' has values that are not finite.")
    try:
        if needs_renaming(pipeline, tensors):
            tensors = in_diffusers_names(pipeline, tensors)
        pipeline.load_lora_weights(tensors, adapter_name=adapter)
    except ImportError as error:
        raise UsageError("A LoRA needs the package 'peft'.", hint="pip install peft") from error
    except Exception as error:  # diffusers and PEFT raise errors of every kind for tensors that do not fit
        raise InputError(f"{path} is not a LoRA of {kind}: {first_sentence(error)}") from error
    if not any(adapter in names for names in pipeline.get_list_adapters().values()):
        raise InputError(f"{path} adapts no layer of {kind}: it is a LoRA of another model.")


def _is_finite(tensor: Tensor) -> bool:
    is_checked = tensor.is_floating_point() and tensor.itemsize > 1  # torch cannot check numbers of eight bits
    return not is_checked or bool(tensor.isfinite().all())


def load_lora_adapter(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Loads a LoRA as diffusers' `load_lora_adapter` does, for quantized layers too."""
    from diffusers.loaders import peft

    create: Callable[..., Any] = peft._create_lora_config

    def create_registered(*config_args: Any, **config_kwargs: Any) -> Any:
        return _register(create(*config_args, **config_kwargs))

    of_diffusers: Any = type(model)
    peft._create_lora_config = create_registered
    try:
        with _visible_weights(model):
            of_diffusers.load_lora_adapter(model, *args, **kwargs)
    finally:
        peft._create_lora_config = create


def add_adapter(model: nn.Module, adapter_config: Any, *args: Any, **kwargs: Any) -> None:
    """Adds a new adapter as diffusers' `add_adapter` does, for quantized layers too."""
    of_diffusers: Any = type(model)
    with _visible_weights(model):
        of_diffusers.add_adapter(model, _register(adapter_config), *args, **kwargs)


def state_dict(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Returns the state of a denoiser as torch does; diffusers also finds the shapes of its float weights in it."""
    state = type(model).state_dict(model, *args, **kwargs)
    return state if args or kwargs else _StateWithShapes.of(model, state)


class _StateWithShapes(OrderedDict[str, Tensor]):
    """A state in which one may look up `X.weight` of a quantized layer X, although it holds no such tensor.

    Before diffusers loads a LoRA into FLUX, it looks up the shapes of the weights there.
    """

    model: nn.Module | None = None

    @classmethod
    def of(cls, model: nn.Module, state: OrderedDict[str, Tensor]) -> _StateWithShapes:
        shown = cls(state)
        vars(shown).update(vars(state), model=model)  # torch keeps versions in an attribute
        return shown

    def __missing__(self, name: str) -> Tensor:
        stem, _, leaf = name.rpartition(".")
        modules = {} if self.model is None or leaf != "weight" else dict(self.model.named_modules())
        layer = getattr(modules.get(stem), "base_layer", modules.get(stem))
        if not isinstance(layer, QuantizedLayer | SplitLayer):
            raise KeyError(name)
        weight: Tensor = _float_attributes(layer)["weight"]
        return weight

    def __reduce__(self) -> Any:
        """Copies and files of a state hold its tensors and not the model."""
        return OrderedDict, (list(self.items()),)


def has_adapters(model: nn.Module) -> bool:
    """Returns whether PEFT has put adapters around layers of a model."""
    return any(hasattr(module, "lora_A") and hasattr(module, "base_layer") for module in model.modules())


def _register(config: Any) -> Any:
    """Registers the wrappers of quantized layers with PEFT, and returns the configuration."""
    if hasattr(config, "_register_custom_module"):
        config._register_custom_module({QuantizedLayer: _wrapped, SplitLayer: _wrapped})
    return config


def _wrapped(target: nn.Module, adapter_name: str, **kwargs: Any) -> nn.Module:
    """Returns the PEFT layer around a quantized layer; a layer that is wrapped already is returned unchanged."""
    linear, convolution = _side_branches()
    wrapper: Any = target
    base = wrapper.get_base_layer() if hasattr(target, "get_base_layer") else target
    kind = linear if len(weight_shape(base)) == 2 else convolution
    return kind(target, adapter_name, **kwargs)


@cache
def _side_branches() -> tuple[type[nn.Module], type[nn.Module]]:
    from peft.tuners import lora

    class SideBranch:
        """Changes PEFT's layers for a base layer without a float weight: adapters cannot be merged into it."""

        def merge(self, *args: Any, **kwargs: Any) -> None:
            raise UsageError(
                "The weights of this denoiser are quantized, and a LoRA cannot be merged into them: leave fuse_lora() "
                "out, or fuse it into the full-precision pipeline, save that, and run: edadm run --model FOLDER."
            )

    class QuantizedLoraLinear(SideBranch, lora.Linear):
        """A LoRA beside a quantized linear layer."""

    class QuantizedLoraConv2d(SideBranch, lora.Conv2d):
        """A LoRA beside a quantized convolution."""

        _float_layer: nn.Module | None = None

        def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
            """Shows PEFT a float convolution as the base layer, because PEFT creates A with the base layer's class.

            PEFT gives A the kernel, stride and padding of the layer, but not the dilation.
            """
            shown = _float_convolution(self.base_layer)
            self.__dict__["_float_layer"] = shown
            try:
                super().update_layer(adapter_name, *args, **kwargs)
            finally:
                del self.__dict__["_float_layer"]
            down: Any = self.lora_A[adapter_name]
            down.dilation = shown.dilation

        def get_base_layer(self) -> nn.Module:
            base: nn.Module = super().get_base_layer()
            return self._float_layer or base

    return QuantizedLoraLinear, QuantizedLoraConv2d


@contextmanager
def _visible_weights(model: nn.Module) -> Iterator[None]:
    """Adds the attributes of float layers to quantized ones while PEFT sets up an adapter.

    PEFT reads the shape, device and element type of `weight` but not its values, so that the tensor needs memory for
    one number only. The attributes are not parameters, buffers or submodules, and they are removed afterwards.
    """
    layers = [module for module in model.modules() if isinstance(module, QuantizedLayer | SplitLayer)]
    for layer in layers:
        layer.__dict__.update(_float_attributes(layer))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unsupported layer type", UserWarning)
            yield
    finally:
        for layer in layers:
            for name in _float_attributes(layer):
                del layer.__dict__[name]


def _float_attributes(layer: nn.Module) -> dict[str, Any]:
    first = layer.parts[0] if isinstance(layer, SplitLayer) else layer
    assert isinstance(first, QuantizedLayer)
    operation, shape = first.operation, weight_shape(layer)
    dtype = torch.float32 if first.bias is None else first.bias.dtype
    number = torch.zeros((), dtype=dtype, device=first.weight_codes.device)
    shown: dict[str, Any] = {"weight": number.expand(shape)}
    if isinstance(layer, SplitLayer):
        shown |= {"in_features": shape[1], "out_features": shape[0]}
    if operation.kind == "conv2d":
        shown |= {
            "kernel_size": shape[2:],
            "stride": operation.stride,
            "padding": operation.padding,
            "dilation": operation.dilation,
            "groups": operation.groups,
        }
    return shown


def _float_convolution(layer: nn.Module) -> nn.Conv2d:
    """Returns a convolution with the attributes of a quantized one; its weight takes the memory of one number."""
    shown = _float_attributes(layer)
    rows, channels = shown["weight"].shape[:2]
    options = {name: shown[name] for name in ("kernel_size", "stride", "padding", "dilation", "groups")}
    convolution = nn.Conv2d(channels * options["groups"], rows, **options, bias=False, device="meta")
    convolution.weight = nn.Parameter(shown["weight"], requires_grad=False)
    return convolution


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """Returns the shape of the weight of a quantized layer, all channel parts together."""
    if isinstance(layer, SplitLayer):
        first = layer.parts[0]
        assert isinstance(first, QuantizedLayer)
        return (first.weight_shape[0], sum(layer.sizes), *first.weight_shape[2:])
    assert isinstance(layer, QuantizedLayer)
    return layer.weight_shape
