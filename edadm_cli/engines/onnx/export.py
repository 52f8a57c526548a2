"""Writes a quantized denoiser as an ONNX file with QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as shape_config

from edadm_cli.engines.graph.interface import GraphInterface
from edadm_cli.engines.graph.tracing import FlatDenoiser, require_channel_factors
from edadm_cli.engines.onnx.nodes import Writer
from edadm_cli.engines.onnx.standins import DOMAIN, LAYER, NAME, with_stand_ins
from edadm_cli.errors import EdadmError, UsageError
from edadm_cli.models.denoiser_calls.call_templates import SAMPLE
from edadm_cli.quant.attention import QuantizedAttention, operand_grid
from edadm_cli.quant.layers import QuantizedLayer, quantized_layers

Target = Literal["onnxruntime", "tensorrt"]
Freedom = Literal["sizes", "batch", "fixed"]
"""The sizes that calls may have.

`sizes` allows any size. `batch` allows any batch and prompt length, with the height and width of the example. `fixed`
allows only the sizes of the example.
"""
OUTPUT = "prediction"
OPSET = 21
"""The first version of ONNX's operator set that has four-bit integers."""

_IR_VERSION = 10  # the version that was released with the opset
_LARGEST_INLINE = 1 << 30  # a protobuf holds at most 2 GiB; beyond 1 GiB, tensors go to a second file
_FREEDOMS: tuple[Freedom, ...] = ("sizes", "batch", "fixed")
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
_NO_REASONS = ("This is step", "-", "Refer to", "##", "*", "Please", "(Refer", "To ", "<class", "Failed to export")
_LONGEST_REASON = 300  # characters of another library's error
_PASSES_THROUGH = ("Transpose", "Mul", "Cast", "Identity", "Reshape")


def export_onnx(
    denoiser: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    path: Path,
    target: Target = "onnxruntime",
    *,
    fixed_sizes: bool = False,
) -> GraphInterface:
    """Writes a quantized denoiser as ONNX and has `onnx.checker` check it.

    Batch, height, width and the number of tokens are free wherever the architecture allows it. If the exporter finds no
    form with a free height and width, as for latents that a UNet cannot halve evenly, these are those of the example.
    If it finds no form with a free batch either, all sizes are those of the example.

    Args:
        denoiser: A denoiser with quantized layers. It is not changed.
        args: The positional arguments of an example call.
        kwargs: The keyword arguments of that call.
        path: The file. If the tensors take more than 1 GiB, they go to a second file beside it, `<name>.data`.
        target: The runtime. `tensorrt` writes activations as int8 with zero-point 0, the only form that TensorRT reads.
        fixed_sizes: Whether calls must have the sizes of the example. Tracing then takes less than half the time.

    Returns:
        The interface, which turns calls into inputs of the graph.

    Raises:
        UsageError: TensorRT is the target, and an activation is not symmetric.
        MachineError: A layer has a transform that is not one factor per channel.
        EdadmError: The denoiser holds something that ONNX cannot express.
    """
    require_channel_factors(denoiser, "ONNX")
    if target == "tensorrt":
        _require_symmetric(denoiser)
    interface = GraphInterface.of(denoiser, args, kwargs)
    wrapper = FlatDenoiser(with_stand_ins(denoiser), interface)
    model = _traced(wrapper, interface.tensors(args, kwargs), ("fixed",) if fixed_sizes else _FREEDOMS)
    _fill_in(model.graph, denoiser, Writer(symmetric=target == "tensorrt"))
    model.opset_imports.pop(DOMAIN, None)
    model.producer_name = "edadm"
    write(model, path)
    onnx.checker.check_model(str(path))
    return wrapper.traced_interface()


def write(model: ir.Model, path: Path) -> None:
    """Writes a model. Its tensors go to a second file if one file would be too large."""
    values = (value.const_value for value in model.graph.initializers.values())
    size = sum(tensor.nbytes for tensor in values if tensor is not None)
    ir.save(model, path, external_data=f"{path.name}.data" if size > _LARGEST_INLINE else None)


def layer_graph(layer: QuantizedLayer, num_dims: int) -> ir.Model:
    """Returns the graph of one quantized layer, from `x` with `num_dims` dimensions of any size to `y`."""
    writer = Writer()
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([f"d{i}" for i in range(num_dims)]))
    y = writer.layer(x, layer, "layer")
    y.type, y.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([f"e{i}" for i in range(num_dims)])
    graph = ir.Graph(
        [x], [y], nodes=writer.nodes, initializers=writer.initializers, opset_imports={"": OPSET}, name="layer"
    )
    return ir.Model(graph, ir_version=_IR_VERSION, producer_name="edadm")


def _traced(wrapper: FlatDenoiser, tensors: dict[str, Tensor], freedoms: Sequence[Freedom]) -> ir.Model:
    """Returns the graph with the first of `freedoms` for which the exporter succeeds."""
    failure: Exception | None = None
    for freedom in freedoms:
        try:
            with _silent_exporter():
                return _export(wrapper, tensors, freedom)
        except Exception as error:  # noqa: BLE001 - whatever the exporter raises is a refusal
            failure = error
    raise EdadmError(
        f"{wrapper.interface.denoiser} has no form in ONNX: {_reason(failure)}",
        hint="edadm engines",
    ) from failure


@contextmanager
def _silent_exporter() -> Iterator[None]:
    """Returns a context without warnings and logs of torch's exporter, whose failures are retried or raised here."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.fx", "torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing: how constants and versions are handled
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _export(wrapper: FlatDenoiser, tensors: dict[str, Tensor], freedom: Freedom) -> ir.Model:
    rows = 0 if freedom == "fixed" else tensors[SAMPLE].shape[0]
    free = torch.export.Dim.AUTO
    dims = {name: _free_dims(name, tensor, rows, freedom) for name, tensor in tensors.items()}
    if rows == 1:  # the exporter would treat a size of one as a constant
        tensors = {name: torch.cat([t, t]) if 0 in dims[name] else t for name, t in tensors.items()}
    # with `use_duck_shape=False`, sizes that happen to be equal in the example may differ in later calls
    with shape_config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
        program = torch.onnx.export(
            wrapper.eval(),
            tuple(tensors.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(tensors),
            output_names=[OUTPUT],
            dynamic_shapes=(tuple(dict.fromkeys(dims[name], free) for name in tensors),),
            verbose=False,
        )
    assert program is not None
    return program.model


def _reason(error: Exception | None) -> str:
    """Returns the line of an exporter's error that says what failed, without colours, lists of steps and advice."""
    lines = [_ESCAPES.sub("", line).strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line and not line.startswith(_NO_REASONS)]
    return lines[-1][:_LONGEST_REASON] if lines else type(error).__name__


def _free_dims(name: str, tensor: Tensor, rows: int, freedom: Freedom) -> list[int]:
    """Returns the dimensions of an input that may change: rows, height and width, and the length of sequences."""
    if tensor.dim() == 0 or tensor.shape[0] != rows:
        return []
    if tensor.dim() == 4 and name == SAMPLE:
        return [0, 2, 3] if freedom == "sizes" else [0]
    return [0, 1] if tensor.dim() == 3 else [0]


def _fill_in(graph: ir.Graph, denoiser: nn.Module, writer: Writer) -> None:
    """Replaces every symbolic node with the layer or the quantizer that it names."""
    layers = quantized_layers(denoiser)
    for node in [node for node in graph if node.domain == DOMAIN]:
        name, x, old = node.attributes[NAME].as_string(), node.inputs[0], node.outputs[0]
        assert x is not None
        is_layer = node.op_type == LAYER
        new = writer.layer(x, layers[name], name) if is_layer else _operand(denoiser, x, name, writer)
        ir.convenience.replace_nodes_and_values(graph, node, [node], writer.nodes, [old], [new])
        for value in writer.initializers:
            graph.register_initializer(value)
        writer.nodes, writer.initializers = [], []
        if not is_layer and name.endswith((".q", ".p")):
            _name_product(new, name)


def _operand(denoiser: nn.Module, x: ir.Value, name: str, writer: Writer) -> ir.Value:
    attention, _, operand = name.rpartition(".")
    processor = denoiser.get_submodule(attention).processor
    assert isinstance(processor, QuantizedAttention)
    scale: Tensor = getattr(processor, f"{operand}_scale")
    return writer.fake_quantize(x, scale, 0, operand_grid(processor.plan, operand), name)


def _name_product(value: ir.Value, name: str) -> None:
    """Gives the product that reads an attention's operand the name that `product_name` returns."""
    node = next(iter(value.consumers()), None)
    while node is not None and node.op_type in _PASSES_THROUGH:
        node = next(iter(node.outputs[0].consumers()), None)
    if node is not None and node.op_type == "MatMul":
        node.name = product_name(name)


def product_name(operand: str) -> str:
    """Returns the name of the attention product that reads the operand `<attention>.q` or `<attention>.p`."""
    return f"{operand}.product"


def _require_symmetric(denoiser: nn.Module) -> None:
    asymmetric = [
        name
        for name, layer in quantized_layers(denoiser).items()
        if layer.plan.input_grid is not None and not _is_symmetric(layer)
    ]
    if asymmetric:
        raise UsageError(
            f"TensorRT reads symmetric activations only, and {len(asymmetric)} layers have a zero-point off the middle"
            f" of their grid, such as '{asymmetric[0]}'.",
            hint="edadm export --engine onnxruntime",
        )


def _is_symmetric(layer: QuantizedLayer) -> bool:
    grid = layer.plan.input_grid
    return grid is not None and int(layer.input_zero_point) == 1 << (grid.num_bits - 1)
