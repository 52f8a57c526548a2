"""The kernels in CUDA C++ as far as no GPU is needed: what they take, how they tile it, and that they compile."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from edadm_kernels import attend_int8_takes, attention_pays, hopper
from edadm_kernels.backend import backend, uses_hopper
from edadm_kernels.hopper import (
    attention,
    attention_int8,
    attention_variant,
    compilation,
    group_norm,
    matrices,
    product,
)
from edadm_kernels.hopper.product import SPLITS, TILES, Shape

INTERPRETED = False

needs_compiler = pytest.mark.skipif(not hopper.is_available(), reason="no cuda-bindings")
SAME = (1, 1, 1, 1)


@pytest.mark.parametrize("size", [(64, 64), (32, 32), (16, 16), (8, 8), (48, 48), (96, 64), (7, 5), (1, 8192), (1, 2)])
@pytest.mark.parametrize("pixels", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("samples", [1, 2, 3, 16])
def test_boxes_cover_the_images(size: tuple[int, int], pixels: int, samples: int) -> None:
    height, width = size
    columns, rows, number = product.boxes(pixels, height, width, samples, 256)
    deep = pixels >> (columns + rows)
    assert (deep << (columns + rows)) == pixels
    assert number == -(-width // (1 << columns)) * -(-height // (1 << rows)) * -(-samples // deep)
    assert number * pixels >= samples * height * width
    if all(side & (side - 1) == 0 for side in (height, width, samples)) and samples * height * width % pixels == 0:
        assert number * pixels == samples * height * width, "powers of two leave nothing over"


def test_a_copy_spans_what_it_may() -> None:
    tile = replace(TILES[3], convolution=True)
    columns, rows, _ = Shape((1, 128, 256), (256, 512), 64, (3, 3), 2, SAME).boxes(tile)
    assert max(2 << columns, 2 << rows) <= 256


@pytest.mark.parametrize("kind", ["linear", "geglu", "conv"])
@pytest.mark.parametrize("rows", [2, 77, 512, 8192, 65536])
@pytest.mark.parametrize(("outputs", "products"), [(320, 320), (1280, 5120), (8, 16), (10240, 1280)])
def test_a_tile_for_every_product(kind: str, rows: int, outputs: int, products: int) -> None:
    shape = Shape.matrix(rows, products)
    tile = product.choose(kind, shape, outputs)  # type: ignore[arg-type]
    assert (tile.geglu, tile.convolution) == (kind == "geglu", kind == "conv")
    assert tile.split in SPLITS
    assert tile.bm % tile.split == 0
    assert tile.cluster == tile.split


@pytest.mark.parametrize(
    ("rows", "outputs", "products", "is_large"),
    [
        *((65536, 320, 320, True), (65536, 320, 1280, True), (16384, 640, 2560, True), (4096, 1280, 5120, True)),
        *((8192, 640, 640, True), (8192, 640, 2560, True), (8192, 320, 320, False), (8192, 320, 1280, False)),
        *((2048, 640, 640, False), (2048, 1280, 5120, False), (65536, 960, 320, False), (8192, 960, 320, False)),
    ],
)
def test_the_kernel_that_adds_a_residual_is_the_one_that_was_measured_faster(
    rows: int, outputs: int, products: int, is_large: bool
) -> None:
    chosen = matrices.choose_over_single(rows, (outputs,), products, adds=True)
    assert (chosen is not None) == is_large
    assert chosen is None or chosen.residual


def test_tiles_fit_a_multiprocessor() -> None:
    for tile in TILES:
        assert tile.blocks * (tile.shared_bytes + 1024) <= 228 * 1024, tile
        assert (tile.bm + tile.bn) * tile.bk % 1024 == 0, "each stage is aligned to what the copies swizzle"
        assert tile.bm * (tile.bn + 8) * 4 <= tile.stages * (tile.bm + tile.bn) * tile.bk, "the sums fit the stages"


def operands(channels: int = 32, outputs: int = 16) -> dict[str, Tensor | None]:
    return {
        "x": torch.zeros(4, channels, dtype=torch.int8),
        "weight": torch.zeros(outputs, channels, dtype=torch.int8),
        "scale": torch.zeros(outputs),
        "correction": torch.zeros(outputs, dtype=torch.int32),
        "bias": torch.zeros(outputs),
        "out": torch.zeros(4, outputs, dtype=torch.float16),
    }


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, True),
        ({"bias": None}, True),
        ({"residual": torch.zeros(4, 16, dtype=torch.float16)}, True),
        ({"out": torch.zeros(4, 16)}, True),
        ({"out": torch.zeros(4, 16), "residual": torch.zeros(4, 16, dtype=torch.float16)}, False),
        ({"residual": torch.zeros(4, 16)}, False),
        ({"out": torch.zeros(4, 16, dtype=torch.bfloat16)}, True),
        (
            {"out": torch.zeros(4, 16, dtype=torch.bfloat16), "residual": torch.zeros(4, 16, dtype=torch.bfloat16)},
            False,
        ),
        ({"weight": torch.zeros(16, 16, dtype=torch.uint8)}, False),
        ({"bias": torch.zeros(16, dtype=torch.float16)}, False),
        ({"x": torch.zeros(4 * 32 + 1, dtype=torch.int8)[1:].view(4, 32)}, False),
        (operands(channels=40), False),
        (operands(outputs=12), False),
    ],
)
def test_what_products_take(change: dict[str, Tensor | None], taken: bool) -> None:
    assert product.takes(**{**operands(), **change}) is taken  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pixels", "channels", "groups"), [(4096, 320, 32), (16384, 960, 32), (1024, 1920, 32), (100, 64, 8), (3, 4096, 32)]
)
def test_group_norm_cuts_every_pixel_once(pixels: int, channels: int, groups: int) -> None:
    plan = group_norm.group_norm_plan(pixels, channels, groups)
    assert plan is not None
    assert (plan.chunks - 1) * plan.chunk_pixels < pixels <= plan.chunks * plan.chunk_pixels
    assert plan.vectors * (group_norm.THREADS // (channels // 8)) >= plan.chunk_pixels


@pytest.mark.parametrize("samples", [1, 2, 3, 16, 200])
@pytest.mark.parametrize(("pixels", "channels"), [(4096, 320), (16384, 960), (1024, 1920), (256, 1280)])
def test_blocks_of_a_batch_run_at_once(pixels: int, channels: int, samples: int) -> None:
    plan = group_norm.group_norm_plan(pixels, channels, 32)
    assert plan is not None
    repeat = plan.repeat(samples)
    blocks = samples * -(-plan.chunks // repeat)
    assert blocks <= 132 * plan.resident(repeat) or blocks == samples, "or no block is left to be joined with another"
    assert repeat == 1 or samples * -(-plan.chunks // (repeat // 2)) > 132, "no more than necessary"


def test_group_norm_of_two_images_is_cut_between_vectors() -> None:
    plan = group_norm.group_norm_plan(4096, 960, 32, 640)
    assert plan is not None
    assert plan == replace(group_norm.group_norm_plan(4096, 960, 32), first=640)  # type: ignore[type-var]
    assert group_norm.group_norm_plan(4096, 960, 32, 644) is None


@pytest.mark.parametrize(
    ("pixels", "channels", "groups"), [(64, 128, 32), (64, 36, 4), (64, 8192, 32), (64, 2048, 128), (10**7, 2048, 32)]
)
def test_shapes_that_stay_with_triton(pixels: int, channels: int, groups: int) -> None:
    assert group_norm.group_norm_plan(pixels, channels, groups) is None


HEAD_WIDTHS = [8, 16, 40, 48, 64, 72, 88, 96, 128, 160]


@pytest.mark.parametrize("keys", [1, 64, 65, 77, 80, 81, 1024, 4096])
@pytest.mark.parametrize("queries", [1, 64, 300, 4096])
@pytest.mark.parametrize("heads", [1, 16, 128])
def test_a_tiling_for_every_attention(heads: int, queries: int, keys: int) -> None:
    for width in range(8, attention_variant.MAX_WIDTH + 1, 8):
        variant = attention_variant.choose(width, queries, keys, heads)
        assert variant.width == width
        assert variant.blocks * (variant.shared_bytes + 1024) <= 228 * 1024, variant
        assert not variant.short or keys <= variant.keys, "all keys fit into one tile"
        assert variant.short == (keys <= 80)


def test_every_tiling_of_the_table_is_among_the_variants() -> None:
    """Widths between those of the table are tiled as the widest of their class is."""
    variants = attention_variant.variants()
    expected = {replace(variant, width=0) for variant in variants if variant.codes and not variant.bias}
    chosen = {
        replace(attention_variant.choose(width, queries, keys, heads), width=0)
        for width in (40, 64, 72, 80, 96, 128, 160)
        for queries in (1, 300, 1024, 4096)
        for keys in (1, 64, 77, 80, 81, 4096)
        for heads in (1, 16, 128)
    }
    assert chosen == expected


def test_large_tiles_of_queries_fill_the_card_or_small_ones_are_taken() -> None:
    assert attention_variant.choose(40, 4096, 4096, 16).rows == 256
    assert attention_variant.choose(40, 300, 300, 16).rows == 128
    assert attention_variant.choose(80, 1024, 1024, 16).rows == 128
    assert attention_variant.choose(80, 1024, 1024, 128).rows == 192
    assert attention_variant.choose(160, 256, 256, 16).rows == 64


@needs_compiler
@pytest.mark.parametrize("keys", [77, 1024])
@pytest.mark.parametrize("width", HEAD_WIDTHS)
def test_heads_of_every_width_compile(width: int, keys: int) -> None:
    """Registers are what they may run out of: then products no longer overlap, and the compiler's word is an error."""
    for heads, queries in ((1, 64), (128, 4096)):
        variant = attention_variant.choose(width, queries, keys, heads)
        assert compilation.compiled(variant.source, variant.defines(), variant.prelude()).startswith(b"\x7fELF")


@pytest.mark.parametrize(
    ("q", "k", "heads", "scale", "taken"),
    [
        (torch.zeros(2, 9, 80).half(), torch.zeros(2, 5, 80).half(), 2, 0.1, True),
        (torch.zeros(2, 9, 240).half()[..., 80:160], torch.zeros(2, 5, 80).half(), 2, 0.1, True),
        (torch.zeros(2, 9, 80), torch.zeros(2, 5, 80), 2, 0.1, False),
        (torch.zeros(2, 9, 80).bfloat16(), torch.zeros(2, 5, 80).bfloat16(), 2, 0.1, False),
        (torch.zeros(2, 9, 80).half(), torch.zeros(2, 5, 80).half(), 2, -0.1, False),
        (torch.zeros(2, 9, 80).half(), torch.zeros(2, 5, 80).half(), 4, 0.1, False),
        (torch.zeros(2, 9, 168).half(), torch.zeros(2, 5, 168).half(), 1, 0.1, False),
        (torch.zeros(2, 9, 81).half()[..., 1:], torch.zeros(2, 5, 80).half(), 2, 0.1, False),
        (torch.zeros(1, 9, 80).half(), torch.zeros(80).half().as_strided((1, 2, 80), (0, 0, 1)), 2, 0.1, False),
    ],
    ids=[
        *("plain", "columns", "float32", "bfloat16", "negative-scale", "20-channels", "168-channels", "odd-rows"),
        "rows-on-top-of-each-other",
    ],
)
def test_what_attention_takes(q: Tensor, k: Tensor, heads: int, scale: float, taken: bool) -> None:
    q, k = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k))
    assert attention.takes(q, k, k, scale) is taken
    if taken:
        assert attention_pays(q.to("meta"), k.to("meta"), k.to("meta"), heads, scale)


@pytest.mark.parametrize(
    ("bias", "taken"),
    [
        (torch.zeros(2, 3, 8).half(), True),
        (torch.zeros(2, 1, 8).half().expand(2, 3, 8), True),
        (torch.zeros(1, 3, 8).half(), False),
        (torch.zeros(2, 1, 8).half(), False),
        (torch.zeros(2, 3, 6).half(), False),
        (torch.zeros(2, 3, 8), False),
        (torch.zeros(2, 3, 8).bfloat16(), False),
        (torch.zeros(2, 3, 9).half()[..., 1:], False),
        (torch.zeros(2, 3, 8, device="meta").half(), False),
    ],
    ids=["plain", "heads", "one-sample", "one-head", "keys", "float32", "bfloat16", "odd", "device"],
)
def test_which_numbers_per_key_attention_takes(bias: Tensor, taken: bool) -> None:
    """A kernel receives an address and strides, so what would be broadcast is left to torch."""
    q, k = torch.zeros(2, 3, 4, 64).half(), torch.zeros(2, 3, 8, 64).half()
    assert attention.takes(q, k, k, 0.1, codes=False, bias=bias) is taken
    assert not attention.takes(q[..., :40], k[..., :40], k[..., :40], 0.1, codes=False, bias=bias)


@pytest.mark.parametrize("change", ["key-type", "value-type", "samples", "heads", "tokens", "channels"])
def test_attention_takes_no_operands_that_do_not_fit(change: str) -> None:
    q = torch.zeros(2, 3, 4, 64).half()
    k, v = torch.zeros(2, 3, 8, 64).half(), torch.zeros(2, 3, 8, 64).half()
    assert attention.takes(q, k, v, 0.1)
    both = {"samples": k[:1], "heads": k[:, :1], "channels": k[..., :40]}.get(change)
    k, v = (k, v) if both is None else (both, both)
    k = k.bfloat16() if change == "key-type" else k
    v = {"value-type": v.bfloat16(), "tokens": v[:, :, :7]}.get(change, v)
    assert not attention.takes(q, k, v, 0.1)


def test_eight_bit_attention_takes_no_more_keys_than_a_sum_can_hold() -> None:
    q = torch.empty(1, 1, 4, 64, dtype=torch.float16, device="meta")
    most = (2**31 - 1) // (255 * 127)
    few, many = (q.new_empty(1, 1, keys, 64) for keys in (most, most + 1))
    assert attend_int8_takes(q, few, 0.1)
    assert not attend_int8_takes(q, many, 0.1)
    assert not attend_int8_takes(q.float(), few.float(), 0.1)


def test_large_attention_is_torchs_where_triton_would_run_it() -> None:
    small, large = (torch.zeros(1, tokens, 320).half() for tokens in (256, 4096))
    assert attention_pays(small, small, small, 8, 0.1)
    assert not attention_pays(large, large, large, 8, 0.1)
    assert attention_pays(*(x.to("meta") for x in (large, large, large)), 8, 0.1)
    assert not attention_pays(*(small[..., :300] for _ in range(3)), 1, 0.1), "heads wider than its kernel takes"


def test_no_kernel_of_theirs_runs_elsewhere() -> None:
    assert not uses_hopper(torch.zeros(1))
    with backend("triton"):
        assert not uses_hopper(torch.zeros(1))


@needs_compiler
def test_code_is_kept_and_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = group_norm.variants()[0]
    monkeypatch.setenv(compilation.CACHE_VARIABLE, str(tmp_path / "kept"))
    code = compilation.compiled(variant.source, variant.defines())
    (kept,) = (tmp_path / "kept").iterdir()
    assert code.startswith(b"\x7fELF")
    assert kept.read_bytes() == code
    kept.write_bytes(b"what is kept is used")
    assert compilation.compiled(variant.source, variant.defines()) == b"what is kept is used"
    assert compilation.compiled(variant.source, variant.defines(), anew=True) == code
    assert kept.read_bytes() == code
    (tmp_path / "file").touch()
    monkeypatch.setenv(compilation.CACHE_VARIABLE, str(tmp_path / "file"))
    assert compilation.compiled(variant.source, variant.defines()) == code
    for name in (compilation.CACHE_VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", _no_home)
    assert compilation.compiled(variant.source, variant.defines()) == code


def _no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


@needs_compiler
def test_a_log_of_nothing_is_written_to_no_bytes_of_pythons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its one zero once went into the `b" "` of the whole process, which pads the headers of files."""
    monkeypatch.setenv(compilation.CACHE_VARIABLE, str(tmp_path))
    variant = attention_variant.choose(40, 4096, 4096, 16)
    assert compilation.compiled(variant.source, variant.defines(), variant.prelude(), anew=True).startswith(b"\x7fELF")
    spaces = b" " * 3
    assert spaces[:1] == "\N{SPACE}".encode()
    assert list(spaces[:1] + b" ") == [32, 32]


@needs_compiler
def test_a_source_that_does_not_compile_is_an_error_with_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(compilation.CACHE_VARIABLE, str(tmp_path))
    variant = group_norm.variants()[0]
    with pytest.raises(compilation.CompilationError, match="static assertion failed"):
        compilation.compiled(variant.source, {**variant.defines(), "CHANNELS": 12})
    assert list(tmp_path.iterdir()) == []


@needs_compiler
@pytest.mark.parametrize("width", [40, 72])
def test_eight_bit_attention_compiles_in_both_sizes(width: int) -> None:
    for queries, heads, static in ((64, 1, False), (4096, 64, True)):
        variant = attention_int8.choose(width, queries, heads, False, static)
        assert compilation.compiled(variant.source, variant.defines(), variant.prelude()).startswith(b"\x7fELF")
