"""Reads the measured times of products in int8 and in float16 per GPU; `benchmarks/product_times.py` writes them.

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

A product that is not in the table has no known time, so no decision depends on it.
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
"""A product: the kind of kernel; M (rows or output pixels), N (output channels) and K (terms per sum); and whether it
adds a residual, for which floating point needs a separate kernel.
"""
SourceKind = Literal["quantize", "layer_norm", "group_norm"]
Source = tuple[SourceKind, int, int]
"""The operation that computes the input `[m, k]` of a product; for an image, m is the number of pixels."""
FILE = "times.json"


class ProductTime(BaseModel):
    """The times of one product with its epilogue, for inputs that are not in the cache."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    m: PositiveInt
    n: PositiveInt
    k: PositiveInt
    adds: bool = Field(description="whether a residual is added")
    int8_us: PositiveFloat = Field(description="microseconds from codes to the output, by the kernel that would run")
    float16_us: PositiveFloat = Field(description="microseconds of torch's float16 in its place")


class SourceTime(BaseModel):
    """The times of the operation before a product: a quantization, or a normalization that returns codes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: SourceKind
    m: PositiveInt
    k: PositiveInt
    int8_us: PositiveFloat = Field(description="microseconds until the codes are there")
    float16_us: NonNegativeFloat = Field(description="microseconds of the same in float16; 0: nothing is needed")


class MeasuredTimes(BaseModel):
    """All times that were measured on one kind of GPU."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    software: dict[str, str] = Field(description="versions that it was measured with")
    products: tuple[ProductTime, ...]
    before: tuple[SourceTime, ...] = ()

    @cached_property
    def by_matrix(self) -> Mapping[Matrix, ProductTime]:
        """Maps each product to its times."""
        return {(time.kind, time.m, time.n, time.k, time.adds): time for time in self.products}

    @cached_property
    def by_source(self) -> Mapping[Source, SourceTime]:
        """Maps each operation that computes the input of a product to its times."""
        return {(time.kind, time.m, time.k): time for time in self.before}


_TABLE = TypeAdapter(dict[str, MeasuredTimes])


@lru_cache(maxsize=1)
def table() -> Mapping[str, MeasuredTimes]:
    """Returns all measured times by the name that torch reports for the GPU."""
    return _TABLE.validate_json(files(__package__).joinpath(FILE).read_bytes())


def measured_times(device: torch.device, dtype: torch.dtype) -> tuple[str, MeasuredTimes] | None:
    """Returns the GPU's name and its times; `None` for a GPU that is not in the table or a type other than float16."""
    if device.type != "cuda" or dtype != torch.float16:
        return None
    name = torch.cuda.get_device_name(device)
    times = table().get(name)
    return None if times is None else (name, times)
