"""Exports are read and written tensor by tensor: what is alive meanwhile, shards, and what can go wrong with them."""

from __future__ import annotations

import errno
import json
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from edadm_cli.artifacts import RunFolder, load_tensors, streaming
from edadm_cli.artifacts.files import atomic_path
from edadm_cli.cli.app import main
from edadm_cli.config import BitWidth, ExportConfig, ReconstructConfig
from edadm_cli.errors import InputError
from edadm_cli.export import folder as export_folder
from edadm_cli.export import round_trip
from edadm_cli.export import stage as export
from edadm_cli.models.loading import load_model
from edadm_cli.models.stored import total_parameters
from edadm_cli.recipe import load_recipe
from edadm_cli.reconstruct import stage as reconstruct

FreshRun = Callable[[Path], RunFolder]
CPU = torch.device("cpu")
W4A8 = BitWidth.parse("w4a8")
CONFIG = ExportConfig(bits=W4A8, device="cpu", parity_samples=1)
INDEX = "unet/diffusion_pytorch_model.safetensors.index.json"


class _Alive(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, while a tensor of theirs is alive.

    Args:
        before: Tensors whose storages are not counted.
    """

    def __init__(self, before: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.users: dict[int, int] = {tensor.untyped_storage().data_ptr(): 1 for tensor in before}
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                place, size = storage.data_ptr(), storage.nbytes()
                self.bytes += 0 if place in self.users else size
                self.users[place] = self.users.get(place, 0) + 1
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(tensor, self._gone, place, size)
        return out

    def _gone(self, place: int, size: int) -> None:
        self.users[place] -= 1
        if not self.users[place]:
            del self.users[place]
            self.bytes -= size


@pytest.fixture
def run(tiny_sd: Path, fresh_run: FreshRun) -> RunFolder:
    run = fresh_run(tiny_sd)
    reconstruct.run(ReconstructConfig(bits=W4A8, recipe=load_recipe("rtn"), device="cpu", batch_size=3), run)
    return run


def test_an_export_holds_codes_and_one_float_weight_at_a_time(run: RunFolder, tmp_path: Path) -> None:
    source = run.open("reconstruct", "w4a8")
    with _Alive() as packing:
        model, num_parameters, _ = round_trip.quantized_model(CONFIG, run, source)
    tensors = model.denoiser.state_dict()
    with _Alive(tensors.values()) as writing:
        export_folder._write_denoiser(model.denoiser, tmp_path, {})
    state = {name: tensor.nbytes for name, tensor in tensors.items()}
    whole = load_model(str(run.open("collect").manifest.model.id), CPU, torch.float32).denoiser
    largest = max(parameter.nbytes for parameter in whole.parameters())
    assert num_parameters == total_parameters(whole)
    assert writing.peak <= 3 * max(state.values())
    assert packing.peak <= sum(state.values()) + 4 * largest


def test_shards_load_like_one_file_and_a_truncated_one_is_named(
    run: RunFolder, tiny_sd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = export.run(CONFIG, run)
    state = load_model(whole.artifact, CPU, torch.float32).denoiser.state_dict()
    monkeypatch.setattr(export_folder, "_SHARD_BYTES", 8_000)
    sharded = Path(export.run(CONFIG, run, force=True).artifact)
    index = json.loads((sharded / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert index["weight_map"].keys() == state.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in _stored(sharded, shards).values())
    loaded = DiffusionPipeline.from_pretrained(sharded).unet.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    shard = sharded / "unet" / shards[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InputError, match=rf"{shards[1]}.*(truncated|bytes)"):
        load_model(str(sharded), CPU, torch.float32)
    assert main(["sample", "--run", str(run.root), "--bits", "w4a8", "-q"]) == 3


def test_a_disk_that_fills_up_between_shards_costs_nothing_but_the_export(
    run: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_folder, "_SHARD_BYTES", 8_000)
    before = run.open("reconstruct", "w4a8").identity
    command = ["export", "--run", str(run.root), "--bits", "w4a8", "--parity-samples", "1", "--device", "cpu"]
    with monkeypatch.context() as full:
        full.setattr(streaming, "atomic_path", _FullDisk(shards=2))
        assert main(command) == 4
    assert "the disk is full" in capsys.readouterr().err
    assert not run.path("export", "w4a8").exists()
    assert run.open("reconstruct", "w4a8").identity == before
    assert main([*command, "-q"]) == 0
    assert main(["inspect", str(run.root), "-q"]) == 0


class _FullDisk:
    """An `atomic_path` on whose disk there is space for so many files."""

    def __init__(self, shards: int) -> None:
        self.left = shards

    @contextmanager
    def __call__(self, path: Path) -> Iterator[Path]:
        with atomic_path(path) as temporary:
            self.left -= 1
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            yield temporary


def _stored(folder: Path, shards: Iterable[str]) -> dict[str, Tensor]:
    return {name: tensor for shard in shards for name, tensor in load_tensors(folder / "unet" / shard).items()}
