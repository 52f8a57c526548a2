"""Exports are read and written tensor by tensor: what is alive meanwhile, shards, and what can go wrong with them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from edadm_cli.artifacts import RunFolder
from edadm_cli.config import BitWidth, ExportConfig, ReconstructConfig
from edadm_cli.export import folder as export_folder
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


def test_an_export_holds_codes_and_one_float_weight_at_a_time(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = run.open("reconstruct", "w4a8")
    with _Alive() as packing:
        model, num_parameters, _ = export.quantized_model(CONFIG, run, source)
    tensors = model.denoiser.state_dict()
    with _Alive(tensors.values()) as writing:
        export_folder._write_denoiser(model.denoiser, tmp_path, {})
    state = {name: tensor.nbytes for name, tensor in tensors.items()}
    whole = load_model(str(run.open("collect").manifest.model.id), CPU, torch.float32).denoiser
    largest = max(parameter.nbytes for parameter in whole.parameters())
    assert num_parameters == total_parameters(whole)
    assert writing.peak <= 3 * max(state.values())
    assert packing.peak <= sum(state.values()) + 4 * largest
