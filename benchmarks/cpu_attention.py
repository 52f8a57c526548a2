"""Measures whether attention gains from slices of its query rows, and from integers, on this processor.

    python benchmarks/cpu_attention.py --heads 8 --tokens 4096 --head-dim 40 --rows 128,512

Each form is one attention as OpenVINO compiles it: `float` with plain operands; `float codes` with operands rounded to
their grids and products in floating point, which processors without VNNI run; `int8` in bytes.
Forms and slices alternate; times are the processor time of all threads, and `off by` is the relative L2 distance from
all rows at once. The kernels are printed too: where the products and the softmax between them are one Subgraph, its
kernel already works on blocks of rows.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as ops

from edadm_cli.engines.openvino import nodes, saturation
from edadm_cli.engines.openvino.execution import runtime_nodes
from edadm_cli.engines.parity import relative_l2
from edadm_cli.quant.grid import activation_grid, weight_grid

FORMS = ("float", "float codes", "int8")
Q_SCALE, P_SCALE = torch.tensor(4 / 127), torch.tensor(1 / 1020)
_MOVED = ("Const", "Input", "Output", "Reshape", "Split", "Concatenation")


def attention(form: str, shape: tuple[int, ...], rows: int) -> ov.Model:
    """Returns softmax(q k^T / sqrt(d)) v of `[1, heads, tokens, head_dim]` by `rows` queries (0: all at once)."""
    parameters = [ops.parameter(list(shape), ov.Type.f32) for _ in range(3)]
    q, k, v = (parameter.output(0) for parameter in parameters)
    if form != "float":
        q, k, v = (nodes.fake_quantize(operand, Q_SCALE, None, weight_grid(8)) for operand in (q, k, v))

    def products(queries: ov.Output) -> ov.Output:
        scores = ops.matmul(queries, k, transpose_a=False, transpose_b=True)
        p = ops.softmax(ops.multiply(scores, np.float32(shape[-1] ** -0.5)), -1).output(0)
        if form != "float":
            p = nodes.fake_quantize(p, P_SCALE, None, activation_grid(8))
        return ops.matmul(p, v, transpose_a=False, transpose_b=False).output(0)

    sizes = [min(rows, shape[2] - start) for start in range(0, shape[2], rows)] if rows else [shape[2]]
    slices = ops.variadic_split(q, np.int64(2), np.array(sizes, np.int64)).outputs() if len(sizes) > 1 else [q]
    graph = ov.Model([ops.concat([products(queries) for queries in slices], 2)], parameters)
    if form == "float codes":
        saturation.replace_saturating_products(graph, frozenset({"attention"}))
    return graph


def compiled(graph: ov.Model, threads: int, precision: str) -> ov.CompiledModel:
    """Compiles a model for the CPU; what is not in bytes runs in `f32` or `bf16`."""
    properties = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    return ov.Core().compile_model(graph, "CPU", properties)


def what_runs(model: ov.CompiledModel) -> str:
    """Returns the kernels and how many there are of each."""
    counts = Counter(f"{node.type} {node.precision}" for node in runtime_nodes(model) if node.type not in _MOVED)
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


def main() -> None:
    """Compiles the forms, times them alternately, and prints the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--head-dim", type=int, default=40)
    parser.add_argument("--rows", default="128,512", help="query rows per slice")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--precision", choices=("f32", "bf16"), default="f32", help="of what is not in bytes")
    options = parser.parse_args()
    shape = (1, options.heads, options.tokens, options.head_dim)
    cuts = [0, *map(int, options.rows.split(","))]
    models = {
        (form, rows): compiled(attention(form, shape, rows), options.threads, options.precision)
        for form in FORMS
        for rows in cuts
    }
    inputs = [*np.random.default_rng(0).standard_normal((3, *shape)).astype(np.float32)]
    milliseconds: dict[tuple[str, int], list[float]] = {case: [] for case in models}
    outputs = {}
    for turn in range(options.repeats + 1):
        for case, model in models.items():
            start = time.process_time()
            outputs[case] = model(inputs)[0]
            if turn:  # the first warms up
                milliseconds[case].append((time.process_time() - start) * 1e3)
    print(
        "products that this processor would sum inexactly:", ", ".join(sorted(saturation.saturating_kinds())) or "none"
    )
    print(f"\n{'form':12} {'rows':>5} {'ms':>8} {'min':>8} {'off by':>8}  what runs")
    for (form, rows), times in milliseconds.items():
        off = relative_l2(torch.from_numpy(outputs[form, rows]), torch.from_numpy(outputs[form, 0]))
        median, shortest = statistics.median(times), min(times)
        print(f"{form:12} {rows or 'all':>5} {median:8.1f} {shortest:8.1f} {off:8.1e}  {what_runs(models[form, rows])}")


if __name__ == "__main__":
    main()
