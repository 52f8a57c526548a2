"""Converts a quantized denoiser in torch to an OpenVINO graph.

The denoiser is traced with a stand-in for every quantized layer: one opaque operation that computes nothing while it is
traced. In the graph it becomes the nodes of `nodes.layer`, with the layer's name. No floating-point weight of a
quantized layer is ever made.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeGuard

import openvino as ov
import torch
from diffusers.models.activations import GEGLU
from openvino.frontend import FrontEndManager
from openvino.frontend.pytorch import ConversionExtension
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
from torch import Tensor, nn

from edadm_cli.engines.graph.interface import GraphInterface
from edadm_cli.engines.graph.tracing import (
    IN_TORCH,
    FlatDenoiser,
    LayerStandIn,
    convolved_sizes,
    copy_with_stand_ins,
    require_channel_factors,
)
from edadm_cli.engines.openvino import nodes
from edadm_cli.engines.openvino.movement import quantize_before_moving
from edadm_cli.engines.openvino.scale_shift import distribute_scales
from edadm_cli.engines.openvino.traced_forms import TracedForms
from edadm_cli.engines.openvino.value_reads import ValueReads
from edadm_cli.errors import EdadmError
from edadm_cli.models.denoiser_calls.call_templates import SAMPLE, TIMESTEP
from edadm_cli.quant.attention import AttentionProducts, QuantizedAttention, operand_grid
from edadm_cli.quant.layers import QuantizedLayer

NAMESPACE = "edadm_openvino"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_LIBRARY.define("linear(Tensor x, int index, int features) -> Tensor")
_LIBRARY.define(
    "conv2d(Tensor x, int index, int features, int[] kernel, int[] stride, int[] padding, int[] dilation) -> Tensor"
)
_LIBRARY.define("geglu(Tensor x, int index, int features) -> Tensor")
_LIBRARY.define("fake_quantize(Tensor x, int index) -> Tensor")
_PLACES = ("Check '", "Exception from ")  # how a report of OpenVINO begins that names a place in its source code
_STEADY = ("mask", "image_embeds")  # parts of the names of arguments that are the same at every step
_OPERATIONS = ("linear", "geglu", "conv2d", "fake_quantize")


def _conv2d_like(
    x: Tensor, index: int, features: int, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    sizes = convolved_sizes(x.shape[2:], kernel, stride, padding, dilation)
    return x.new_zeros([x.shape[0], features, *sizes])


for _name in ("linear", "geglu"):
    _LIBRARY.impl(_name, lambda x, index, features: x.new_zeros([*x.shape[:-1], features]), "CompositeExplicitAutograd")
_LIBRARY.impl("conv2d", _conv2d_like, "CompositeExplicitAutograd")
_LIBRARY.impl("fake_quantize", lambda x, index: x.clone(), "CompositeExplicitAutograd")


@torch.no_grad()
def convert(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[ov.Model, GraphInterface]:
    """Converts a quantized denoiser. Its inputs keep dynamic shapes, so that other sizes can be set later.

    Where the denoiser computes row by row, or reads values of a mask or of lengths in Python, the graph fits only calls
    that agree with the example in these, and its interface refuses others.

    Args:
        denoiser: A denoiser with quantized layers, on any device; it is not changed.
        args: The positional arguments of an example call.
        kwargs: The keyword arguments of that call.

    Returns:
        The graph, which is float32 where it is not quantized and has four-bit weights as i4 constants, and its call
        interface.

    Raises:
        MachineError: A layer has a transform that is not one factor per channel.
        EdadmError: OpenVINO cannot express the denoiser.
    """
    require_channel_factors(denoiser, "OpenVINO")
    tracing = _Tracing(denoiser)
    interface = GraphInterface.of(denoiser, args, kwargs)
    tensors, reads = interface.tensors(args, kwargs), ValueReads()

    def context(inputs: Mapping[str, Tensor]) -> TracedForms:
        reads.begin(inputs)
        return TracedForms(reads)

    wrapper = FlatDenoiser(tracing.model, interface, context)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tracing: constants from shapes, and that torch.jit is deprecated
            # a second trace to check the first one would double the time
            decoder = TorchScriptPythonDecoder(
                wrapper, example_input=tuple(tensors.values()), trace_kwargs={"check_trace": False}, skip_freeze=True
            )
        _require_steady_values(type(denoiser).__name__, tensors, reads.names)
        model = _translate(decoder, tracing.extensions())
        quantize_before_moving(model)
        distribute_scales(model)
        for name, port in zip(interface.inputs, model.inputs, strict=True):
            port.set_names({name})
            port.node.friendly_name = name
    except EdadmError:
        raise
    except Exception as error:  # whatever tracing or the converter raises is a refusal
        raise EdadmError(
            f"OpenVINO cannot convert {type(denoiser).__name__}: {_reason(error)}", hint=IN_TORCH
        ) from error
    has_fixed_rows = not _takes_another_row(model, tensors)
    return model, wrapper.traced_interface().specific(tensors, has_fixed_rows, reads.names, reads.sizes)


def _require_steady_values(denoiser: str, tensors: Mapping[str, Tensor], names: Iterable[str]) -> None:
    """Checks that no values that change from step to step were read while a denoiser was traced.

    Masks of text and embeddings of images do not, although they may be floating-point numbers (HunyuanVideo 1.5).

    Raises:
        EdadmError: The sample, the timestep or another floating-point input was read.
    """
    steady = {name for name in names if any(part in name for part in _STEADY)}
    changing = sorted(
        name for name in names if name == TIMESTEP or (tensors[name].is_floating_point() and name not in steady)
    )
    if changing:
        raise EdadmError(
            f"OpenVINO cannot convert {denoiser}: what it computes next depends on values of {changing[0]}, as with"
            " experts that are chosen per token.",
            hint=IN_TORCH,
        )


def _takes_another_row(model: ov.Model, tensors: Mapping[str, Tensor]) -> bool:
    """Returns whether a graph predicts one row more for inputs with one row more."""
    rows = tensors[SAMPLE].shape[0]
    more = {
        name: [rows + 1, *tensor.shape[1:]] if tensor.shape[:1] == (rows,) else list(tensor.shape)
        for name, tensor in tensors.items()
    }
    graph = model.clone()
    try:
        graph.reshape(more)
    except RuntimeError:  # a shape inside the graph is that of the example
        return False
    shape = graph.outputs[0].get_partial_shape()
    return bool(shape.rank.is_static and shape[0] == rows + 1)


def _translate(decoder: TorchScriptPythonDecoder, extensions: list[ConversionExtension]) -> ov.Model:
    """Returns the same graph as `openvino.convert_model`, but sends no usage reports.

    It also omits the passes over the graph, which are repeated anyway when the graph is compiled.
    """
    frontend = FrontEndManager().load_by_framework("pytorch")
    for extension in extensions:
        frontend.add_extension(extension)
    return frontend.convert(frontend.load(decoder))


def _reason(error: Exception) -> str:
    """Returns what the converter does not translate, or the line of an error that says what failed.

    The converter ends its report with a summary of operations. The error that tracing raised follows a line
    `Exception:`. Other reports of OpenVINO begin with the place in its source code and end with what failed.
    """
    _, _, summary = str(error).partition("Summary:")
    untranslated = dict.fromkeys(re.findall(r"aten::\w+", summary))
    if untranslated:
        return f"it does not translate {', '.join(untranslated)}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "Exception:" in lines[:-1]:
        return lines[lines.index("Exception:") + 1]
    if not lines:
        return type(error).__name__
    return lines[-1] if lines[0].startswith(_PLACES) else lines[0]


class _Tracing:
    """Holds a copy of a denoiser for tracing, which shares its tensors, and turns its stand-ins into nodes."""

    def __init__(self, denoiser: nn.Module) -> None:
        self.converters: list[Callable[[ov.Output], ov.Output]] = []
        stand_ins: dict[int, Any] = {}
        for name, module in denoiser.named_modules():
            if isinstance(module, GEGLU) and _is_integer(module.proj):
                stand_ins[id(module)] = _GegluStandIn(module.proj, self._register_geglu(module.proj, f"{name}.proj"))
            elif isinstance(module, QuantizedLayer):
                stand_ins[id(module)] = _LayerStandIn(module, self._register_layer(module, name))
            elif isinstance(getattr(module, "processor", None), QuantizedAttention):
                stand_ins[id(module.processor)] = _AttentionStandIn(self._register_operands(module.processor))
        self.model = copy_with_stand_ins(denoiser, stand_ins)

    def extensions(self) -> list[ConversionExtension]:
        """Returns the functions that the converter calls for the stand-ins."""

        def nodes_of(context: Any) -> list[ov.Output]:
            return [self.converters[context.get_values_from_const_input(1)](context.get_input(0))]

        return [ConversionExtension(f"{NAMESPACE}::{op}", nodes_of) for op in _OPERATIONS]

    def _register(self, converter: Callable[[ov.Output], ov.Output]) -> int:
        self.converters.append(converter)
        return len(self.converters) - 1

    def _register_layer(self, module: QuantizedLayer, name: str) -> int:
        return self._register(lambda x: nodes.layer(x, module, name))

    def _register_geglu(self, module: QuantizedLayer, name: str) -> int:
        return self._register(lambda x: nodes.geglu(x, module, name))

    def _register_operands(self, processor: QuantizedAttention) -> dict[str, int]:
        def converter(operand: str) -> Callable[[ov.Output], ov.Output]:
            grid, scale = operand_grid(processor.plan, operand), getattr(processor, f"{operand}_scale")
            return lambda x: nodes.fake_quantize(x, scale, None, grid)

        return {operand: self._register(converter(operand)) for operand in ("q", "k", "v", "p")}


def _is_integer(layer: nn.Module) -> TypeGuard[QuantizedLayer]:
    return isinstance(layer, QuantizedLayer) and layer.plan.input_grid is not None


class _LayerStandIn(LayerStandIn):
    """Computes one operation that holds the layer's index in the list of converters."""

    def __init__(self, layer: QuantizedLayer, index: int) -> None:
        super().__init__(layer)
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        """Returns zeros in the shape of the layer's output."""
        op, result = self.operation, x
        if op.kind == "linear":
            result = torch.ops.edadm_openvino.linear(x, self.index, self.out_features)
        else:
            kernel = list(self.weight_shape[2:])
            result = torch.ops.edadm_openvino.conv2d(
                x, self.index, self.out_features, kernel, list(op.stride), list(op.padding), list(op.dilation)
            )
        return result


class _GegluStandIn(nn.Module):
    """Takes the place of a gated feed-forward layer with a quantized projection."""

    def __init__(self, projection: QuantizedLayer, index: int) -> None:
        super().__init__()
        self.index, self.features = index, projection.out_features // 2

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Returns zeros in the shape of the gated output."""
        result: Tensor = torch.ops.edadm_openvino.geglu(x, self.index, self.features)
        return result


class _AttentionStandIn(AttentionProducts):
    """Computes attention whose operands pass through stand-ins for their quantizers.

    Heads are a dimension of their own, because OpenVINO makes one kernel of the products, the softmax and the
    transpositions in that form.
    """

    def __init__(self, indices: dict[str, int]) -> None:
        super().__init__()
        self.indices = indices

    def products(self, attn: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Returns the same as `AttentionProducts.products`, from operands `[batch, heads, tokens, head_dim]`."""
        batch, _, width = query.shape
        q, k, v = (
            self.on_operand(name, projected.view(batch, -1, attn.heads, width // attn.heads).transpose(1, 2))
            for name, projected in (("q", query), ("k", key), ("v", value))
        )
        scores = torch.matmul(q, k.transpose(-1, -2)) * attn.scale
        if mask is not None:
            scores = scores + mask.view(batch, attn.heads, -1, mask.shape[-1])
        p = self.on_operand("p", scores.softmax(dim=-1))
        return torch.matmul(p, v).transpose(1, 2).reshape(batch, -1, width)

    def on_operand(self, operand: str, tensor: Tensor) -> Tensor:
        """Returns an operand of attention after the stand-in for its quantizer."""
        result: Tensor = torch.ops.edadm_openvino.fake_quantize(tensor, self.indices[operand])
        return result
