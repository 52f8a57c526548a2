"""The roofline model of a denoiser on a GPU: a lower bound for the time of each unique layer.

    time = max(2 * MACs / peak, bytes / bandwidth)

Peaks are the dense ones of the data sheets, with float32 accumulation for half precision. The model ignores kernel
launches, partly filled waves and memory latency, so that measured times are longer, most of all for small layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import nn

from edadm_cli.bench.workload import FORMS, Form, WorkItem, macs_by_kind, unique_shapes, workload
from edadm_cli.models.architecture import load_architecture
from edadm_cli.models.example_calls import example_call
from edadm_cli.models.random_models import SUFFIX


@dataclass(frozen=True)
class DevicePeak:
    """The peak rates of a GPU.

    Attributes:
        name: Its common name.
        fp16_tflops: Dense half-precision rate of its tensor cores, in 10^12 operations per second.
        int8_tops: Dense INT8 rate of its tensor cores, in 10^12 operations per second.
        bandwidth_gb_s: Bandwidth of its memory, in 10^9 bytes per second.
    """

    name: str
    fp16_tflops: float
    int8_tops: float
    bandwidth_gb_s: float

    def milliseconds(self, item: WorkItem, form: Form) -> float:
        """Returns the roofline time of one item in milliseconds, with operands in `form`."""
        tops = self.int8_tops if item.is_integer and form != "fp16" else self.fp16_tflops
        return max(2 * item.macs / (tops * 1e9), item.bytes_moved(form) / (self.bandwidth_gb_s * 1e6))


DEVICES = (
    # NVIDIA H200 Tensor Core GPU datasheet, SXM: 1,979 TFLOPS and 3,958 TOPS with sparsity, half of it dense
    DevicePeak("H200", 989.5, 1979, 4800),
    # NVIDIA H100 Tensor Core GPU datasheet, SXM
    DevicePeak("H100", 989.5, 1979, 3350),
    # NVIDIA A100 Tensor Core GPU datasheet, SXM, 80 GB and 40 GB
    DevicePeak("A100 80GB", 312, 624, 2039),
    DevicePeak("A100 40GB", 312, 624, 1555),
    # NVIDIA Ampere GA102 GPU Architecture whitepaper, appendix A: half precision with float32 accumulation, dense
    DevicePeak("RTX 3090", 71, 284, 936),
    # NVIDIA Ada GPU Architecture whitepaper, appendix A: the same
    DevicePeak("RTX 4090", 165.2, 660.6, 1008),
)


@dataclass(frozen=True)
class ShapeRoofline:
    """The roofline of one unique shape.

    Attributes:
        kind: See `WorkItem.kind`.
        m, n, k, batch: The sizes of its product; see `WorkItem`.
        count: Number of its occurrences in a call.
        is_integer: Whether it runs in integers in the quantized network.
        macs: Multiply-accumulates of one occurrence.
        bytes: Maps a form to the bytes that one occurrence reads and writes.
        microseconds: Maps a device and a form to the roofline time of one occurrence.
    """

    kind: str
    m: int
    n: int
    k: int
    batch: int
    count: int
    is_integer: bool
    macs: int
    bytes: dict[Form, float]
    microseconds: dict[str, dict[Form, float]]


@dataclass(frozen=True)
class RooflineTable:
    """The rooflines of one call of a denoiser.

    Attributes:
        shapes: Every unique shape, in the order of first occurrence, without elementwise operations that are fused.
        macs: Maps a kind of layer to the multiply-accumulates of the call.
        milliseconds: Maps a device and a form to the sum of the roofline times of the call.
        speedup: Maps a device and an integer form to the largest speed-up over fp16 that the sums allow.
    """

    shapes: tuple[ShapeRoofline, ...]
    macs: dict[str, int]
    milliseconds: dict[str, dict[Form, float]]
    speedup: dict[str, dict[Form, float]]

    def to_json(self) -> dict[str, Any]:
        """Returns the table as plain data, under the names of the attributes."""
        return asdict(self)

    @classmethod
    def of_json(cls, data: Mapping[str, Any]) -> RooflineTable:
        """Returns the table that `to_json` wrote."""
        shapes = tuple(ShapeRoofline(**shape) for shape in data["shapes"])
        return cls(**{**data, "shapes": shapes})


def roofline_table(
    denoiser: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    devices: Sequence[DevicePeak] = DEVICES,
    *,
    attention_in_integers: bool = False,
) -> RooflineTable:
    """Returns the rooflines of `denoiser(*args, **kwargs)`; `workload` says what is counted."""
    items = workload(denoiser, args, kwargs, attention_in_integers=attention_in_integers)
    shapes = unique_shapes(item for item in items if item.kind != "elementwise")
    total: dict[str, dict[Form, float]] = {device.name: defaultdict(float) for device in devices}
    rows = []
    for shape, count in shapes.items():
        times = {device.name: {form: device.milliseconds(shape, form) for form in FORMS} for device in devices}
        for name, by_form in times.items():
            for form, milliseconds in by_form.items():
                total[name][form] += count * milliseconds
        rows.append(_row(shape, count, times))
    sums = {name: dict(by_form) for name, by_form in total.items()}
    speedup: dict[str, dict[Form, float]] = {
        name: {form: by_form["fp16"] / by_form[form] for form in FORMS if form != "fp16"}
        for name, by_form in sums.items()
    }
    return RooflineTable(tuple(rows), macs_by_kind(items), sums, speedup)


def model_rooflines(
    model: str, batch_size: int = 2, devices: Sequence[DevicePeak] = DEVICES, *, attention_in_integers: bool = False
) -> RooflineTable:
    """Returns the rooflines of a known architecture, such as `sd15`, without allocating its weights.

    Args:
        model: Name of the architecture, with or without `-random`.
        batch_size: Rows of the call: images times guidance branches.
        devices: The GPUs to compute rooflines for.
        attention_in_integers: Whether attention's two products count as integer.
    """
    architecture = load_architecture(model.removesuffix(SUFFIX))
    name = architecture.denoiser_name
    with torch.device("meta"):
        denoiser = architecture.component_class(name)(**architecture.config(name)).eval()
    args, kwargs = example_call(denoiser, batch_size=batch_size)
    return roofline_table(denoiser, args, kwargs, devices, attention_in_integers=attention_in_integers)


def render_rooflines(table: RooflineTable) -> Iterator[Table]:
    """Yields tables for people: work by kind, every unique shape, and the sums with the speed-up that they allow."""
    yield _work(table)
    yield _shapes(table)
    yield _times(table)
    yield _sums(table)


def _row(shape: WorkItem, count: int, times: dict[str, dict[Form, float]]) -> ShapeRoofline:
    return ShapeRoofline(
        kind=shape.kind,
        m=shape.m,
        n=shape.n,
        k=shape.k,
        batch=shape.batch,
        count=count,
        is_integer=shape.is_integer,
        macs=shape.macs,
        bytes={form: shape.bytes_moved(form) for form in FORMS},
        microseconds={
            name: {form: milliseconds * 1e3 for form, milliseconds in by_form.items()}
            for name, by_form in times.items()
        },
    )


def _work(table: RooflineTable) -> Table:
    total = sum(table.macs.values())
    result = _titled("Multiply-accumulates of one call", "kind", "GMAC", "share")
    for kind, macs in table.macs.items():
        result.add_row(kind, f"{macs / 1e9:.1f}", f"{macs / total:.1%}")
    result.add_row("total", f"{total / 1e9:.1f}", "")
    return result


def _shapes(table: RooflineTable) -> Table:
    titles = ("layer", "kind", "M", "N", "K", "batch", "count", "MMAC", "MB fp16", "MB W8A8")
    result = _titled("Layers of different shapes", *titles)
    for number, row in enumerate(table.shapes, 1):
        sizes = (str(size) if row.macs else "" for size in (row.m, row.n, row.k, row.batch))
        macs = f"{row.macs / 1e6:.1f}" if row.macs else ""
        megabytes = (f"{row.bytes[form] / 1e6:.2f}" for form in ("fp16", "w8a8"))
        result.add_row(str(number), row.kind, *sizes, str(row.count), macs, *megabytes)
    return result


def _times(table: RooflineTable) -> Table:
    names = tuple(table.milliseconds)
    result = _titled("Roofline of one layer in microseconds, fp16 > W8A8", "layer", "kind", *names)
    for number, row in enumerate(table.shapes, 1):
        times = (f"{row.microseconds[name]['fp16']:.2f} > {row.microseconds[name]['w8a8']:.2f}" for name in names)
        result.add_row(str(number), row.kind, *times)
    return result


def _sums(table: RooflineTable) -> Table:
    title = "Roofline of the call in milliseconds, and the speed-up it allows over fp16"
    result = _titled(title, "device", "fp16", "W8A8", "W4A8", "W8A8 speed-up", "W4A8 speed-up")
    for name, times in table.milliseconds.items():
        allowed = table.speedup[name]
        result.add_row(
            name, *(f"{times[form]:.2f}" for form in FORMS), f"{allowed['w8a8']:.2f}x", f"{allowed['w4a8']:.2f}x"
        )
    return result


def _titled(title: str, first: str, *others: str) -> Table:
    result = Table(title=Text(title), title_justify="left")
    result.add_column(first, no_wrap=True)
    for other in others:
        result.add_column(other, justify="right", no_wrap=True)
    return result
