"""Measures how near linear layers in bytes come to the rate of this processor, and whether another form is faster.

    python benchmarks/cpu_linear.py --tokens 256,1024

Each form is one layer as OpenVINO compiles it, between the quantizers of its input and of its output: `linear`;
`convolution`, with a kernel of one by one over the same numbers; `linear + GELU`; and `linear + sigmoid`, which
computes the same GELU from a sigmoid. Forms alternate on one thread, and times are the processor time of this process.
The rate of the processor is that of a loop of dot products of bytes (`vpdpbusd` of AVX-512), compiled with `cc`.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as ops

from edadm_cli.engines.base import EngineOptions
from edadm_cli.engines.openvino.denoiser import plugin_properties

FORMS = ("linear", "convolution", "linear + GELU", "linear + sigmoid")
SIZES = ((1152, 1152), (1152, 4608), (4608, 1152))  # inputs and outputs of DiT-XL/2 and PixArt
_INSTRUCTIONS, _REPEATS = 12, 1_000_000
_LOOP = """
#include <immintrin.h>
#include <stdio.h>
#include <time.h>
int main(void) {
    __m512i x = _mm512_set1_epi8(1), %(declared)s;
    double best = 1e9;
    for (int turn = 0; turn < 30; turn++) {
        struct timespec start, end;
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &start);
        for (long i = 0; i < %(repeats)d; i++)
            __asm__ volatile("%(body)s" : %(outputs)s : "v"(x));
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &end);
        double seconds = (end.tv_sec - start.tv_sec) + 1e-9 * (end.tv_nsec - start.tv_nsec);
        if (seconds < best) best = seconds;
    }
    printf("%%.4f", 2.0 * 64 * %(instructions)d * %(repeats)d / best / 1e12);
}
"""


def processor_tops() -> float:
    """Returns the 10^12 operations per second of dot products of bytes on one core; a multiply-accumulate is two."""
    places = range(_INSTRUCTIONS)
    source = _LOOP % {
        "declared": ", ".join(f"a{place} = x" for place in places),
        "body": "".join(f"vpdpbusd %{_INSTRUCTIONS}, %{_INSTRUCTIONS}, %{place}\\n" for place in places),
        "outputs": ", ".join(f'"+v"(a{place})' for place in places),
        "instructions": _INSTRUCTIONS,
        "repeats": _REPEATS,
    }
    with tempfile.TemporaryDirectory() as folder:
        code, program = Path(folder) / "loop.c", Path(folder) / "loop"
        code.write_text(source)
        subprocess.run(["cc", "-O2", "-mavx512f", "-o", program, code], check=True)
        return float(subprocess.run([program], check=True, stdout=subprocess.PIPE, text=True).stdout)


def _number(value: float | np.ndarray) -> ov.Node:
    return ops.constant(np.asarray(value, np.float32))


def _integers(*values: int) -> ov.Node:
    return ops.constant(np.asarray(values, np.int64))


def _quantized(x: ov.Node, low: float, high: float) -> ov.Node:
    return ops.fake_quantize(x, *map(_number, (low, high, low, high)), 256)


def _weight(outputs: int, inputs: int, generator: np.random.Generator) -> ov.Node:
    codes = generator.integers(-127, 128, (outputs, inputs), dtype=np.int8)
    return ops.multiply(ops.convert(ov.op.Constant(codes), "f32"), _number(np.full((outputs, 1), 1e-3)))


def layer(form: str, tokens: int, inputs: int, outputs: int) -> ov.Model:
    """Returns a layer of `[1, tokens, inputs]` in a form, before a small layer that reads its output in bytes."""
    generator = np.random.default_rng(0)
    parameter = ops.parameter([1, tokens, inputs], ov.Type.f32)
    x, weight = _quantized(parameter, -0.9, 1.1), _weight(outputs, inputs, generator)
    y = _convolved(x, weight) if form == "convolution" else _multiplied(x, weight, form)
    return ov.Model([ops.matmul(y, _weight(16, outputs, generator), False, True)], [parameter])


def _convolved(x: ov.Node, weight: ov.Node) -> ov.Node:
    (_, tokens, inputs), outputs = x.get_output_shape(0), weight.get_output_shape(0)[0]
    image = ops.reshape(ops.transpose(x, _integers(0, 2, 1)), _integers(1, inputs, tokens // 16, 16), False)
    kernel = ops.reshape(weight, _integers(outputs, inputs, 1, 1), False)
    y = ops.convolution(image, kernel, [1, 1], [0, 0], [0, 0], [1, 1])
    y = _quantized(ops.add(y, _number(np.ones((1, outputs, 1, 1)))), -3.0, 3.0)
    return ops.transpose(ops.reshape(y, _integers(1, outputs, tokens), False), _integers(0, 2, 1))


def _multiplied(x: ov.Node, weight: ov.Node, form: str) -> ov.Node:
    y = ops.add(ops.matmul(x, weight, False, True), _number(np.ones((1, 1, weight.get_output_shape(0)[0]))))
    if form == "linear + GELU":
        y = ops.gelu(y, "tanh")
    elif form == "linear + sigmoid":  # of 2 sqrt(2 / pi) (y + 0.044715 y^3)
        inner = ops.multiply(y, ops.add(ops.multiply(ops.multiply(y, y), _number(0.0713548)), _number(1.5957691)))
        y = ops.multiply(y, ops.sigmoid(inner))
    return _quantized(y, -3.0, 3.0)


def measure(tokens: int, inputs: int, outputs: int, turns: int) -> dict[str, list[float]]:
    """Returns the seconds of each turn of each form."""
    properties = plugin_properties(EngineOptions(torch.device("cpu"), torch.bfloat16, 1))
    x = np.random.default_rng(1).uniform(-1, 1, (1, tokens, inputs)).astype(np.float32)
    requests = {
        form: ov.Core().compile_model(layer(form, tokens, inputs, outputs), "CPU", properties).create_infer_request()
        for form in FORMS
    }
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    for turn in range(turns + 1):
        for form, request in requests.items():
            start = time.process_time()
            request.infer([x], share_inputs=True)
            if turn:  # the first call allocates
                seconds[form].append(time.process_time() - start)
    return seconds


def main() -> None:
    """Measures all forms in turns, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="256,1024", help="numbers of tokens, multiples of 16")
    parser.add_argument("--turns", type=int, default=15)
    options = parser.parse_args()
    rate = processor_tops()
    print(f"dot products of bytes alone: {rate:.3f} TOPS per core\n")
    print(f"{'tokens':>6} {'inputs':>6} {'outputs':>7}  {'form':17} {'ms, median':>10} {'shortest':>8} {'of rate':>8}")
    for tokens in map(int, options.tokens.split(",")):
        for inputs, outputs in SIZES:
            for form, times in measure(tokens, inputs, outputs, options.turns).items():
                share = 2e-12 * tokens * inputs * outputs / min(times) / rate
                middle, shortest = statistics.median(times) * 1e3, min(times) * 1e3
                print(f"{tokens:6} {inputs:6} {outputs:7}  {form:17} {middle:10.2f} {shortest:8.2f} {share:8.0%}")


if __name__ == "__main__":
    main()
