"""The choice of tiles: pure, within the machine's limits, and without a tail where none is needed."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from edadm_kernels.launching import PROGRAM_SHARED_BYTES
from edadm_kernels.pack import w4_block
from edadm_kernels.tiles import KINDS, SPLIT_ROWS, Kind, Tile, candidates, choose, known_arch, shipped
from edadm_kernels.tuning import architectures, load, parse

INTERPRETED = False

DEVICES = architectures()
SHAPES = [(8192, 320, 2880, 320), (2048, 640, 5760, 640), (512, 1280, 11520, 1280), (128, 1280, 23040, 2560)]


def without_split(tile: Tile) -> Tile:
    return replace(tile, split_k=1)


@pytest.mark.parametrize("arch", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_chosen_is_shipped(arch: int, kind: Kind, packed: bool) -> None:
    for m, n, k, channels in SHAPES:
        tile = choose(arch, kind, m, n, k, channels, packed)
        assert without_split(tile) in shipped(arch, packed)
        assert tile == choose(arch, kind, m, n, k, channels, packed)
        assert channels % tile.bk == 0
        assert tile.split_k == 1 or (m <= SPLIT_ROWS and kind != "geglu")
        if packed:
            assert tile.bk == w4_block(channels)


@pytest.mark.parametrize("arch", DEVICES)
@pytest.mark.parametrize("packed", [False, True])
def test_shipped_tiles_fit_the_machine(arch: int, packed: bool) -> None:
    for tile in shipped(arch, packed):
        assert tile.shared_bytes <= PROGRAM_SHARED_BYTES[arch]
        assert tile.bm >= 64 or arch != 90
        assert tile.bn % tile.column_parts == 0
        # the accumulators alone take this many registers per thread
        assert tile.bm * tile.bn / (32 * tile.num_warps) < (tile.max_registers or 255)


@pytest.mark.parametrize("arch", DEVICES)
def test_a_small_product_fills_the_machine(arch: int) -> None:
    tile = choose(arch, "conv", 128, 1280, 23040, 2560)
    programs = -(-128 // tile.bm) * -(-1280 // tile.bn) * tile.split_k
    assert programs >= load(arch).machine.multiprocessors / 2


def test_odd_channels_get_the_least_waste() -> None:
    assert {tile.bk for tile in candidates(90, "conv", 8192, 36, 4)} == {64}
    assert {tile.bk for tile in candidates(90, "linear", 8192, 640)} == {64, 128}


def test_other_architectures_get_the_tuning_of_an_earlier_one() -> None:
    assert [known_arch(arch) for arch in (80, 86, 87, 89, 90, 100, 120)] == [80, 86, 86, 89, 90, 89, 89]
    with pytest.raises(RuntimeError, match=r"8\.0 or later is expected, found 7\.5"):
        known_arch(75)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"fastest": [{"kind": "conv"}]}, "a choice with kind, m, n, k, tile, split is expected"),
        ({"machine": {"multiprocessors": 0}}, "positive numbers"),
        ({"instruction": "imma"}, "wgmma or mma is expected, found 'imma'"),
        ({"speed": 3}, "gpu, instruction and machine are expected"),
    ],
)
def test_a_file_with_a_wrong_entry_is_refused(change: dict[str, object], text: str) -> None:
    content = {"gpu": "a GPU", "instruction": "mma", "machine": asdict(load(80).machine)}
    assert parse(content, "sm_80.json").costs == load(90).costs
    with pytest.raises(ValueError, match=f"sm_80.json: .*{text}"):
        parse(content | change, "sm_80.json")
