"""Runs a graph in ONNX Runtime, and reads how ONNX Runtime executes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor

from edadm_cli.engines.base import OperationTime
from edadm_cli.engines.onnx.export import write
from edadm_cli.engines.onnx.integers import in_integers
from edadm_cli.errors import InputError

INTEGER_PRODUCTS = (
    "ConvInteger",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "QGemm",
    "QLinearConv",
    "QLinearMatMul",
)
_FLOAT_PRODUCTS = ("Conv", "FusedConv", "NhwcFusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")
_CONVOLUTIONS = ("ConvInteger", "QLinearConv", "Conv", "FusedConv", "NhwcFusedConv")
_KINDS = {
    "norm": ("LayerNormalization", "SkipLayerNormalization", "InstanceNormalization", "GroupNorm", "ReduceMean"),
    "quantize": ("QuantizeLinear", "DequantizeLinear"),
    "reorder": (
        "Transpose",
        "Reshape",
        "Concat",
        "Split",
        "Slice",
        "Expand",
        "Unsqueeze",
        "Squeeze",
        "Gather",
        "ReorderInput",
        "ReorderOutput",
    ),
}
_MODEL, _DATA, _OPTIMIZED = "model.onnx", "optimized.data", "optimized.onnx"
_ERRORS_ONLY = 4  # lower levels are not logged, because failures are raised and reported by this tool


@dataclass(frozen=True)
class Session:
    """Holds a graph that is ready to run.

    Attributes:
        runtime: The session of ONNX Runtime.
        operators: The operator of each node of the optimized graph, which is executed, by node name.
        model: The graph that was given to ONNX Runtime.
    """

    runtime: onnxruntime.InferenceSession
    operators: dict[str, str]
    model: ir.Model

    def run(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Returns the only output of the graph for inputs by name.

        Raises:
            InputError: The inputs do not fit the graph.
        """
        arrays = {name: np.ascontiguousarray(tensor.detach().cpu().numpy()) for name, tensor in inputs.items()}
        try:
            return torch.from_numpy(self.runtime.run(None, arrays)[0])
        except Exception as error:  # ONNX Runtime's exceptions have no class of their own that is public
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"ONNX Runtime cannot run the graph with {shapes}: {reason}") from error

    def operator(self, name: str) -> str | None:
        """Returns the operator that computes the product of a name; `None` if the optimizer removed the product."""
        return self.operators.get(name)


def load_session(path: Path, num_threads: int | None) -> Session:
    """Loads a graph that `export_onnx` wrote, rewrites it for integers, and passes it to ONNX Runtime.

    Raises:
        InputError: The file is missing or broken.
    """
    try:
        model = ir.load(path)
        in_integers(model)
    except Exception as error:  # protobuf, a missing second file, a graph of another origin
        raise InputError(
            f"{path} holds no ONNX graph of a quantized denoiser: {type(error).__name__}.", hint="edadm export --force"
        ) from error
    return make_session(model, num_threads)


def make_session(model: ir.Model, num_threads: int | None) -> Session:
    """Passes a graph to ONNX Runtime on the CPU, and returns its session."""
    with TemporaryDirectory(prefix="edadm-onnx-") as folder:
        place = Path(folder)
        write(model, place / _MODEL)
        options = _options(num_threads)
        options.optimized_model_filepath = str(place / _OPTIMIZED)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", _DATA)
        runtime = onnxruntime.InferenceSession(str(place / _MODEL), options, providers=["CPUExecutionProvider"])
        optimized = onnx.load(place / _OPTIMIZED, load_external_data=False)
    products = (*INTEGER_PRODUCTS, *_FLOAT_PRODUCTS)
    operators = {_own_name(node.name): node.op_type for node in optimized.graph.node if node.op_type in products}
    return Session(runtime, operators, model)


def profile(session: Session, inputs: Mapping[str, Tensor], num_threads: int | None) -> list[OperationTime]:
    """Returns the time of each node in the second of two calls, from ONNX Runtime's profiler."""
    with TemporaryDirectory(prefix="edadm-onnx-") as folder:
        place = Path(folder)
        write(session.model, place / _MODEL)
        options = _options(num_threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(place / "profile")
        runtime = onnxruntime.InferenceSession(str(place / _MODEL), options, providers=["CPUExecutionProvider"])
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        for _ in range(2):
            runtime.run(None, arrays)
        events = json.loads(Path(runtime.end_profiling()).read_text(encoding="utf-8"))
    kernels = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    kernels.sort(key=lambda event: event["ts"])
    return [_operation(event) for event in kernels[len(kernels) // 2 :]]


def _operation(event: dict[str, Any]) -> OperationTime:
    name, operator = event["name"].removesuffix("_kernel_time"), event["args"]["op_name"]
    is_product = operator in INTEGER_PRODUCTS or operator in _FLOAT_PRODUCTS
    kind = next((kind for kind, operators in _KINDS.items() if operator in operators), "elementwise")
    if is_product:
        kind = "conv2d" if operator in _CONVOLUTIONS else "attention" if name.endswith(".product") else "linear"
    precision = "int8" if operator in INTEGER_PRODUCTS else "float32"
    return OperationTime(_own_name(name), kind, precision, event["dur"] / 1e3)


def _own_name(name: str) -> str:
    """Returns a node's original name, which the optimizer extended by `/MatmulTransposeFusion/` or `_nchwc`."""
    return name.partition("/")[0].removesuffix("_nchwc").removesuffix(":0")


def _options(num_threads: int | None) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    if num_threads is not None:
        options.intra_op_num_threads = num_threads
    # without it, products of uint8 and int8 saturate at 16 bits on x86 processors that lack VNNI
    options.add_session_config_entry("session.x64quantprecision", "1")
    return options
