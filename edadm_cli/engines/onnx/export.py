"""A quantized denoiser as an ONNX file with QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as shape_config

from edadm_cli.engines.interface import GraphInterface, class_path
from edadm_cli.engines.onnx.nodes import Writer
from edadm_cli.engines.onnx.standins import DOMAIN, LAYER, NAME, with_stand_ins
from edadm_cli.errors import EdadmError, UsageError
from edadm_cli.models.calls import SAMPLE
from edadm_cli.quant.attention import QuantizedAttention, operand_grid
from edadm_cli.quant.layers import QuantizedLayer, quantized_layers

Target = Literal["onnxruntime", "tensorrt"]
OUTPUT = "prediction"
OPSET = 21
"""The first with four-bit integers."""

_IR_VERSION = 10  # the one that came with the opset
_LARGEST_INLINE = 1 << 30  # a protobuf ends at 2 GiB; beyond one, tensors go to a file beside it
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
    """Write a quantized denoiser as ONNX, checked by `onnx.checker`.

    Batch, height, width and the number of tokens are free wherever the architecture leaves them free.

    Args:
        denoiser: With quantized layers; it is not changed.
        args: Of a call.
        kwargs: Of that call.
        path: Of the file; tensors beyond 1 GiB go to a second one beside it, `<name>.data`.
        target: `tensorrt` writes activations as int8 with zero-point 0, the only form that TensorRT reads.
        fixed_sizes: Whether calls must have the sizes of the example; tracing then takes less than half the time.

    Returns:
        How calls become inputs of the graph.

    Raises:
        UsageError: TensorRT is the target and an activation is not symmetric.
        EdadmError: The denoiser holds something that has no form in ONNX.
    """
    if target == "tensorrt":
        _require_symmetric(denoiser)
    interface = GraphInterface.of(denoiser, args, kwargs)
    wrapper = _Flat(with_stand_ins(denoiser), interface)
    model = _traced(wrapper, interface.tensors(args, kwargs), fixed_sizes)
    _fill_in(model.graph, denoiser, Writer(symmetric=target == "tensorrt"))
    model.opset_imports.pop(DOMAIN, None)
    model.producer_name = "edadm"
    write(model, path)
    onnx.checker.check_model(str(path))
    return interface.model_copy(update={"returns": wrapper.returned.path})


def write(model: ir.Model, path: Path) -> None:
    """Write a model, its tensors in a second file where one would be too large."""
    values = (value.const_value for value in model.graph.initializers.values())
    size = sum(tensor.nbytes for tensor in values if tensor is not None)
    ir.save(model, path, external_data=f"{path.name}.data" if size > _LARGEST_INLINE else None)


@dataclass(eq=False)
class _Returned:
    """Import path of what the denoiser returned: the exporter undoes what tracing sets on the module itself."""

    path: str | None = None


def layer_graph(layer: QuantizedLayer, num_dims: int) -> ir.Model:
    """The graph of one quantized layer, from `x` with any sizes to `y`."""
    writer = Writer()
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([f"d{i}" for i in range(num_dims)]))
    y = writer.layer(x, layer, "layer")
    y.type, y.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([f"e{i}" for i in range(num_dims)])
    graph = ir.Graph(
        [x], [y], nodes=writer.nodes, initializers=writer.initializers, opset_imports={"": OPSET}, name="layer"
    )
    return ir.Model(graph, ir_version=_IR_VERSION, producer_name="edadm")


class _Flat(nn.Module):
    """A denoiser that takes the inputs of its graph one after another and returns its prediction."""

    def __init__(self, denoiser: nn.Module, interface: GraphInterface) -> None:
        super().__init__()
        self.denoiser, self.interface, self.returned = denoiser, interface, _Returned()

    def forward(self, *tensors: Tensor) -> Tensor:
        """Call the denoiser."""
        output = self.denoiser(**self.interface.call(dict(zip(self.interface.inputs, tensors, strict=True))))
        self.returned.path = class_path(output)
        prediction: Tensor = output[0]
        return prediction


def _traced(wrapper: _Flat, tensors: dict[str, Tensor], fixed_sizes: bool) -> ir.Model:
    rows = 0 if fixed_sizes else tensors[SAMPLE].shape[0]
    free = torch.export.Dim.AUTO
    shapes = tuple(dict.fromkeys(_free_dims(name, tensor, rows), free) for name, tensor in tensors.items())
    if rows == 1:  # a size of one would be taken for a constant
        tensors = {
            name: torch.cat([t, t]) if 0 in dims else t for (name, t), dims in zip(tensors.items(), shapes, strict=True)
        }
    try:
        # without `use_duck_shape`, sizes that happen to be equal in the example are not taken for the same
        with warnings.catch_warnings(), shape_config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
            warnings.simplefilter("ignore")  # of tracing: how constants and versions are handled
            program = torch.onnx.export(
                wrapper.eval(),
                tuple(tensors.values()),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(tensors),
                output_names=[OUTPUT],
                dynamic_shapes=(shapes,),
                verbose=False,
            )
    except Exception as error:  # whatever the exporter raises is a refusal
        reason = str(error).strip().splitlines()
        raise EdadmError(
            f"{wrapper.interface.denoiser} has no form in ONNX: {reason[0] if reason else type(error).__name__}"
        ) from error
    assert program is not None
    return program.model


def _free_dims(name: str, tensor: Tensor, rows: int) -> list[int]:
    """Dimensions that may change: rows; of the sample all but its channels; of sequences their length."""
    if tensor.dim() == 0 or tensor.shape[0] != rows:
        return []
    if tensor.dim() == 4 and name == SAMPLE:
        return [0, 2, 3]
    return [0, 1] if tensor.dim() == 3 else [0]


def _fill_in(graph: ir.Graph, denoiser: nn.Module, writer: Writer) -> None:
    """Replace every symbolic node by the layer or the quantizer that it names."""
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
    """Name the product that an attention's operand goes to after the operand."""
    node = next(iter(value.consumers()), None)
    while node is not None and node.op_type in _PASSES_THROUGH:
        node = next(iter(node.outputs[0].consumers()), None)
    if node is not None and node.op_type == "MatMul":
        node.name = product_name(name)


def product_name(operand: str) -> str:
    """Name of the product of attention's `<attention>.q` or `<attention>.p`."""
    return f"{operand}.product"


def _require_symmetric(denoiser: nn.Module) -> None:
    found = [
        name
        for name, layer in quantized_layers(denoiser).items()
        if layer.plan.input_grid is not None and not _is_symmetric(layer)
    ]
    if found:
        raise UsageError(
            f"TensorRT reads symmetric activations only, and {len(found)} layers have a zero-point off the middle of"
            f" their grid, such as '{found[0]}'.",
            hint="edadm export --engine onnxruntime",
        )


def _is_symmetric(layer: QuantizedLayer) -> bool:
    grid = layer.plan.input_grid
    return grid is not None and int(layer.input_zero_point) == 1 << (grid.num_bits - 1)
