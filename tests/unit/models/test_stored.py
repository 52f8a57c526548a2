"""Weights that are read whenever they are used: the same network, and less memory than its weights take."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from edadm_cli.errors import InputError
from edadm_cli.models.checkpoints.accounting import empty_module
from edadm_cli.models.example_calls import example_call
from edadm_cli.models.families.layers import is_weighted
from edadm_cli.models.random_models import build_random_pipeline, random_readers
from edadm_cli.models.stored import file_readers, num_weights, place_stored
from tests.unit.models.tiny import shrunk

CPU = torch.device("cpu")
CHILD = """
import sys, torch
from pathlib import Path
from torch import nn
from edadm_cli.artifacts.peak import resident_peak_mib
from edadm_cli.models.stored import file_readers, place_stored
WIDTH, DEPTH = 1024, 24
with torch.device("meta"):
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)))
x = torch.ones(1, WIDTH)
before = resident_peak_mib()
place_stored(model, file_readers((Path(sys.argv[1]),)), torch.device("cpu"))
with torch.no_grad():
    for _ in range(2):
        assert model(x).isfinite().all()
print(resident_peak_mib() - before, 4 * WIDTH * WIDTH * DEPTH / 2**20)
"""


def test_a_denoiser_with_stored_weights_is_the_same_denoiser() -> None:
    architecture = shrunk("flux-schnell")
    built = build_random_pipeline(architecture, 3, torch.float32).transformer
    stored = empty_module(architecture, architecture.denoiser_name)
    place_stored(stored, random_readers(stored, architecture, 3), CPU)
    layers = {name for name, module in built.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name, module in stored.named_modules() if is_weighted(module)} >= layers
    assert not layers & {name.removesuffix(".weight") for name, _ in stored.named_parameters() if "weight" in name}
    assert all(num_weights(stored.get_submodule(name)) == built.get_submodule(name).weight.numel() for name in layers)
    args, kwargs = example_call(built, batch_size=2)
    with torch.no_grad():
        assert torch.equal(stored(*args, **kwargs).sample, built(*args, **kwargs).sample)


def test_a_forward_takes_less_memory_than_the_weights(tmp_path: Path) -> None:
    width, depth = 1024, 24
    layers = range(depth)
    tensors = {f"{i}.weight": torch.full((width, width), 1e-3, dtype=torch.bfloat16) for i in layers}
    save_file(tensors | {f"{i}.bias": torch.zeros(width) for i in layers}, tmp_path / "model.safetensors")
    command = [sys.executable, "-c", CHILD, str(tmp_path / "model.safetensors")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    growth, weights = map(float, result.stdout.split())
    assert growth < weights / 2


class _Copies(TorchDispatchMode):
    """Counts the copies of tensors."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_is_copied_once_when_it_is_read(dtype: torch.dtype, tmp_path: Path) -> None:
    """The copy holds the file no more; it is the conversion, where there is one."""
    save_file({"weight": torch.full((3, 4), 0.5, dtype=dtype)}, tmp_path / "model.safetensors")
    read = file_readers((tmp_path / "model.safetensors",))["weight"]
    with _Copies() as copies:
        values = read(CPU, torch.float32)
    assert copies.count == 1
    assert torch.equal(values, torch.full((3, 4), 0.5))


def test_a_weight_of_another_shape_is_refused_by_its_name(tmp_path: Path) -> None:
    save_file({"0.weight": torch.zeros(3, 4), "0.bias": torch.zeros(4)}, tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    place_stored(model, file_readers((tmp_path / "model.safetensors",)), CPU)
    with pytest.raises(InputError, match=r"'0\.weight' has shape \[3, 4\], expected \[4, 4\]"):
        model(torch.zeros(1, 4))
