"""Times of products in INT8 and in float16 as measured, by GPU; `benchmarks/product_times.py` fills them in.

    {"NVIDIA H200": {
        "software": {"torch": "2.11.0", "triton": "3.6.0"},
        "products": [
            {"kind": "linear", "m": 512, "n": 1280, "k": 1280, "adds": false, "int8_us": 5.1, "float16_us": 6.0}
        ],
        "before": [
            {"kind": "quantize", "m": 8192, "k": 320, "int8_us": 3.1, "float16_us": 0.0},
            {"kind": "layer_norm", "m": 8192, "k": 320, "int8_us": 4.9, "float16_us": 6.2}
        ]
    }}

What is not in the table is not known, and nothing is decided by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, lru_cache
from importlib.resources import files
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, TypeAdapter

from edadm_kernels.tiles import Kind

Matrix = tuple[Kind, int, int, int, bool]
"""Which kernel; M, N, K of what it multiplies: rows or output pixels, output channels, terms of a sum; and whether it
adds a residual, which in floating point is a kernel of its own.
"""
SourceKind = Literal["quantize", "layer_norm", "group_norm"]
Source = tuple[SourceKind, int, int]
"""What makes the input `[m, k]` of a product; of an image m counts its pixels."""
FILE = "times.json"


class ProductTime(BaseModel):
    """One product, its epilogue included, with inputs that do not lie in the cache."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    m: PositiveInt
    n: PositiveInt
    k: PositiveInt
    adds: bool = Field(description="whether a residual is added")
    int8_us: PositiveFloat = Field(description="microseconds from codes to the output, by the kernel that would run")
    float16_us: PositiveFloat = Field(description="microseconds of torch's float16 in its place")


class SourceTime(BaseModel):
    """What makes the input of a product: a quantization by itself, or a normalization that hands over codes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: SourceKind
    m: PositiveInt
    k: PositiveInt
    int8_us: PositiveFloat = Field(description="microseconds until the codes are there")
    float16_us: NonNegativeFloat = Field(description="microseconds of the same in float16; 0: nothing is needed")


class MeasuredTimes(BaseModel):
    """What was measured on one kind of GPU."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    software: dict[str, str] = Field(description="versions that it was measured with")
    products: tuple[ProductTime, ...]
    before: tuple[SourceTime, ...] = ()

    @cached_property
    def by_matrix(self) -> Mapping[Matrix, ProductTime]:
        """The products by what they multiply."""
        return {(time.kind, time.m, time.n, time.k, time.adds): time for time in self.products}

    @cached_property
    def by_source(self) -> Mapping[Source, SourceTime]:
        """What stands before the products, by what it makes."""
        return {(time.kind, time.m, time.k): time for time in self.before}


_TABLE = TypeAdapter(dict[str, MeasuredTimes])


@lru_cache(maxsize=1)
def table() -> Mapping[str, MeasuredTimes]:
    """All that was measured, by the GPU's name as torch gives it."""
    return _TABLE.validate_json(files(__package__).joinpath(FILE).read_bytes())


def measured_times(device: torch.device, dtype: torch.dtype) -> tuple[str, MeasuredTimes] | None:
    """The name of a GPU and its times; `None` where nothing was measured: another GPU, another type than float16."""
    if device.type != "cuda" or dtype != torch.float16:
        return None
    name = torch.cuda.get_device_name(device)
    found = table().get(name)
    return None if found is None else (name, found)
