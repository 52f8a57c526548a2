"""Switches one denoiser between full precision and its partly quantized state.

Layers are exchanged, and no weight is copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from edadm_cli.quant.network import set_module, set_processor


class SwitchableNetwork:
    """A denoiser whose planned layers and attention processors can be replaced and restored.

    Args:
        denoiser: The full-precision denoiser; it is changed in place.
        layers: Dotted names of the layers that will be replaced.
        attentions: Dotted names of the attention modules whose processors will be replaced.
    """

    def __init__(self, denoiser: nn.Module, layers: list[str], attentions: list[str]) -> None:
        self.denoiser = denoiser
        self.float_layers = {name: denoiser.get_submodule(name) for name in layers}
        self._float_processors: dict[str, object] = {
            name: denoiser.get_submodule(name).processor for name in attentions
        }
        self._layers: dict[str, nn.Module] = {}
        self._processors: dict[str, object] = {}

    @property
    def device(self) -> torch.device:
        """The device of the denoiser."""
        return next(iter(self.denoiser.parameters())).device

    def float_weight(self, name: str) -> Tensor:
        """Returns the full-precision weight of a planned layer."""
        weight = self.float_layers[name].weight
        assert isinstance(weight, Tensor)
        return weight

    def put_layer(self, name: str, module: nn.Module) -> None:
        """Replaces one layer, until `restore`."""
        self._layers[name] = module
        set_module(self.denoiser, name, module)

    def put_processor(self, name: str, processor: object) -> None:
        """Replaces one attention processor, until `restore`."""
        self._processors[name] = processor
        set_processor(self.denoiser.get_submodule(name), processor)

    def restore(self, layers: Iterable[str], attentions: Iterable[str]) -> None:
        """Restores the original form of some layers and attention modules permanently."""
        for name in layers:
            self._layers.pop(name, None)
            set_module(self.denoiser, name, self.float_layers[name])
        for name in attentions:
            if self._processors.pop(name, None) is not None:
                set_processor(self.denoiser.get_submodule(name), self._float_processors[name])

    @contextmanager
    def full_precision(self) -> Iterator[None]:
        """Restores the original layers and processors while entered."""
        self._install(self.float_layers, self._float_processors, only=True)
        try:
            yield
        finally:
            self._install(self._layers, self._processors, only=False)

    def _install(self, layers: dict[str, nn.Module], processors: dict[str, object], only: bool) -> None:
        for name in self._layers if only else layers:
            set_module(self.denoiser, name, layers[name])
        for name in self._processors if only else processors:
            set_processor(self.denoiser.get_submodule(name), processors[name])
