"""Denoisers quantized by other tools, for comparison: with their own ranges, from the same weights.

- `nncf`: NNCF's post-training quantization of the OpenVINO graph of the full-precision denoiser, run by OpenVINO as the
  engine's own graph is.
- `torchao`: dynamic INT8 activations and INT8 weights on the linear layers, compiled by torch.

Neither has this package's checks of parity: what is measured is their speed.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from edadm_cli.bench.contender import TORCH, Call, Spec
from edadm_cli.bench.quantized import folder_mib
from edadm_cli.errors import MachineError, UsageError

NNCF, TORCHAO = "nncf", "torchao"
_PACKAGES = {NNCF: ("nncf", "openvino"), TORCHAO: ("torchao",)}


def require_peers(names: Sequence[str], device: torch.device) -> None:
    """Refuse peers that cannot run here, before any work is done.

    Raises:
        MachineError: One is not installed.
        UsageError: One does not run on the device.
    """
    for name in names:
        missing = [package for package in _PACKAGES[name] if importlib.util.find_spec(package) is None]
        if missing:
            raise MachineError(
                f"--against {name} needs the package '{missing[0]}', which is not installed here.",
                hint=f"pip install {missing[0]}",
            )
        if name == NNCF and device.type != "cpu":
            raise UsageError("--against nncf compares on the CPU; this bench runs on a GPU.", hint="--against torchao")


def nncf_spec(float_folder: Path, calls: Sequence[Call], dtype: str, folder: Path) -> Spec:
    """Quantize the OpenVINO graph of the full-precision denoiser with NNCF.

    Args:
        float_folder: The engine's files of that denoiser.
        calls: Whose activations NNCF takes its ranges from.
        dtype: Element type of the rest, chosen when the graph is compiled.
        folder: Where the quantized graph goes.
    """
    import nncf
    import openvino as ov

    from edadm_cli.engines.openvino import files

    nncf.set_log_level("ERROR")
    graph, description = files.read(float_folder)
    graph.reshape(dict(zip(description.interface.inputs, map(list, description.shapes), strict=True)))
    tensors = [description.interface.tensors(*call) for call in calls]
    inputs = [{name: tensor.numpy() for name, tensor in found.items()} for found in tensors]
    quantized = nncf.quantize(
        graph, nncf.Dataset(inputs), subset_size=len(inputs), model_type=nncf.ModelType.TRANSFORMER
    )
    folder.mkdir(parents=True)
    ov.save_model(quantized, folder / files.GRAPH_FILE, compress_to_fp16=False)
    shutil.copyfile(float_folder / files.DESCRIPTION_FILE, folder / files.DESCRIPTION_FILE)
    return Spec(
        name=f"{NNCF} w8a8",
        engine=NNCF,
        runs_on="openvino",
        dtype=dtype,
        bits="w8a8",
        compiled=True,
        folder=folder,
        size_mib=folder_mib(folder),
    )


def torchao_spec(float_folder: Path, dtype: str, num_weights: int, is_cuda: bool) -> Spec:
    """INT8 linear layers of torchao, in a torch denoiser of element type `dtype`."""
    return Spec(
        name=f"{TORCHAO} w8a8",
        engine=TORCHAO,
        runs_on=TORCH,
        dtype=dtype,
        bits="w8a8",
        compiled=True,
        folder=float_folder,
        size_mib=num_weights / 2**20,
        graphs=is_cuda,
        channels_last=True,
    )


def quantize_with_torchao(denoiser: nn.Module) -> None:
    """Exchange the linear layers, in place."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(denoiser, Int8DynamicActivationInt8WeightConfig())
