r"""LPIPS, the learned perceptual distance, to the full-precision image of the same seed.

$$ d(x, y) = \sum_l \frac{1}{H_l W_l} \sum_{h, w} \lVert w_l \odot (\hat{x}^l_{hw} - \hat{y}^l_{hw}) \rVert_2^2 $$

with the unit-length activations of AlexNet's five convolutions and the learned weights $w_l$. The package `lpips`
supplies the arithmetic and $w_l$. AlexNet's ImageNet weights are torchvision's: a file that the user names, or the one
in torch's cache. Nothing is downloaded.

References:
    Zhang et al., The Unreasonable Effectiveness of Deep Features as a Perceptual Metric (arXiv 1801.03924), eq. 1.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edadm_cli.artifacts.tensors import load_pickled_tensors
from edadm_cli.errors import InputError, missing_package
from edadm_cli.metrics.base import Context, Metric, Value

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

CACHED_FILE = "alexnet-owt-7be5be79.pth"
"""The file of torchvision's `AlexNet_Weights.IMAGENET1K_V1`."""
MIN_SIDE = 32
"""Smallest side of an image in pixels, because of AlexNet's strides."""


class Lpips(Metric):
    """LPIPS of version 0.1 with AlexNet, which is computed only if it is named, since it needs two optional files."""

    name, label = "lpips", "LPIPS"
    better = "lower"
    description = "learned perceptual distance, AlexNet"
    paired = True
    by_default = False
    compared = "lpips/alexnet"

    def identity(self, config: Any) -> dict[str, Any]:
        """Returns the hash of AlexNet's weights, if a file is named."""
        from edadm_cli.artifacts import file_sha256

        path = config.lpips_weights
        return {} if path is None else {"lpips_weights": file_sha256(path) if path.is_file() else str(path)}

    def open(self, config: Any, device: torch.device) -> nn.Module:
        """Loads the network.

        Raises:
            MachineError: The package lpips is not installed.
            InputError: AlexNet's weights are missing, or the file holds something else.
        """
        return load_lpips(config.lpips_weights, device)

    def compute(self, context: Context, resource: nn.Module) -> Value:
        """Compares the images batch by batch.

        Raises:
            InputError: The images are too small.
        """
        import torch

        values = []
        for (images, _), (reference, _) in zip(context.images.pairs(), context.reference.pairs(), strict=True):
            if min(images.shape[-2:]) < MIN_SIDE:
                size = "x".join(map(str, images.shape[-2:]))
                raise InputError(f"LPIPS needs images of at least {MIN_SIDE} pixels per side, and these are {size}.")
            with torch.inference_mode():
                values.append(resource(_levels(images, resource), _levels(reference, resource)).flatten())
        distances = torch.cat(values).double().cpu()
        return Value(float(distances.mean()), self.compared, len(distances), tuple(distances.tolist()))


def load_lpips(weights: Path | None, device: torch.device) -> nn.Module:
    """Returns the network of the package `lpips` with AlexNet's weights from a file.

    Args:
        weights: State dictionary of torchvision's AlexNet; `None` for the file in torch's cache.
        device: The device of the network.

    Raises:
        MachineError: The package is not installed.
        InputError: The file is missing or holds something else.
    """
    try:
        import lpips
    except ModuleNotFoundError as error:
        raise missing_package(error, "LPIPS") from error
    state = _alexnet(weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's old spelling of "without weights" in the package
        network: Any = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    names = {name: f"features.{name.partition('.')[2]}" for name in network.net.state_dict()}  # slice1.0.weight
    try:
        network.net.load_state_dict({name: state[source] for name, source in names.items()})
    except (KeyError, RuntimeError) as error:
        raise InputError(f"{weights or CACHED_FILE} does not hold the weights of torchvision's AlexNet.") from error
    ready: nn.Module = network.to(device).eval().requires_grad_(False)
    return ready


def _alexnet(path: Path | None) -> dict[str, Tensor]:
    import torch

    path = path or Path(torch.hub.get_dir()) / "checkpoints" / CACHED_FILE
    if not path.is_file():
        raise InputError(
            f"LPIPS needs the ImageNet weights of torchvision's AlexNet, expected in {path}, which is missing.",
            hint=f"download https://download.pytorch.org/models/{CACHED_FILE} and give it with --lpips-weights FILE",
        )
    return load_pickled_tensors(path)


def _levels(images: Tensor, network: nn.Module) -> Tensor:
    """Returns 8-bit levels `(N, 1 or 3, H, W)` as three channels in [-1, 1] on the network's device."""
    device = next(network.parameters()).device
    return images.to(device).float().expand(-1, 3, -1, -1) / 127.5 - 1.0


METRICS: tuple[Metric, ...] = (Lpips(),)
