"""Measures 8-bit weights on this processor: the speed of products of bytes, and the cost of exact products.

    python benchmarks/cpu_bytes.py --threads 2

Layers of Stable Diffusion 1.5 in four forms, which alternate: `float32` without any quantization; `codes in float32`
with inputs rounded to their codes and weights of the same values; `bytes`, what the CPU engine runs where that is
exact; `halves`, weights as 2 h + r and two products of bytes that always fit 16 bits. Times are the processor time of
all threads, errors are relative L2 distances from `codes in float32`.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as ops

from edadm_cli.engines.openvino import saturation
from edadm_cli.engines.parity import relative_l2

LAYERS = (
    ("conv 3x3", (1, 320, 64, 64), (320, 320, 3, 3)),
    ("conv 3x3", (1, 640, 32, 32), (640, 640, 3, 3)),
    ("linear", (4096, 320), (1280, 320)),
    ("linear", (1024, 640), (2560, 640)),
)
STEP = np.float32(0.02)
FORMS = ("float32", "codes in float32", "bytes", "halves")


def graph(form: str, shape: tuple[int, ...], codes: np.ndarray) -> ov.Model:
    """Builds one layer in one form; the weights are `codes` times a hundredth."""
    parameter = ops.parameter(list(shape), ov.Type.f32)
    real = ops.constant(codes.astype(np.float32) / 100)
    low, high = ops.constant(np.float32(0)), ops.constant(255 * STEP)
    x = parameter if form == "float32" else ops.fake_quantize(parameter, low, high, low, high, 256)
    if form == "halves":
        parts = ((codes >> 1, 0.02), (codes & 1, 0.01))
        output = ops.add(*(_product(x, _scaled(part, scale)) for part, scale in parts))
    else:
        output = _product(x, _scaled(codes, 0.01) if form == "bytes" else real)
    return ov.Model([output], [parameter])


def _product(x: ov.Node, weight: ov.Node) -> ov.Node:
    if len(weight.get_output_shape(0)) == 2:
        return ops.matmul(x, weight, transpose_a=False, transpose_b=True)
    return ops.convolution(x, weight, [1, 1], [1, 1], [1, 1], [1, 1])


def _scaled(codes: np.ndarray, scale: float) -> ov.Node:
    scales = np.full([codes.shape[0], *[1] * (codes.ndim - 1)], scale, np.float32)
    return ops.multiply(ops.convert(ops.constant(codes), "f32"), ops.constant(scales))


def main() -> None:
    """Compiles the forms, times them alternately, and prints the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    generator = np.random.default_rng(0)
    print(
        "products that this processor would sum inexactly:", ", ".join(sorted(saturation.saturating_kinds())) or "none"
    )
    for name, shape, weight_shape in LAYERS:
        codes = generator.integers(-128, 128, weight_shape).astype(np.int8)
        x = generator.uniform(0, 255 * STEP, shape).astype(np.float32)
        properties = {"INFERENCE_NUM_THREADS": options.threads, "INFERENCE_PRECISION_HINT": "f32"}
        models = {form: ov.Core().compile_model(graph(form, shape, codes), "CPU", properties) for form in FORMS}
        times: dict[str, list[float]] = {form: [] for form in FORMS}
        outputs = {}
        for turn in range(options.repeats + 1):
            for form, model in models.items():
                start = time.process_time()
                outputs[form] = torch.from_numpy(model([x])[0].copy())
                if turn:  # the first warms up
                    times[form].append((time.process_time() - start) * 1e3)
        print(f"\n{name} {list(weight_shape)} on {list(shape)}\n{'form':18} {'ms':>7} {'min':>7} {'error':>8}")
        for form in FORMS:
            error = relative_l2(outputs[form], outputs["codes in float32"])
            print(f"{form:18} {statistics.median(times[form]):7.1f} {min(times[form]):7.1f} {error:8.1e}")


if __name__ == "__main__":
    main()
