r"""Turns LoRA adapters of a denoiser into side branches, which an engine runs beside its own layers.

    y = Q(x) + U diag(s) D x

D `[R, C_in]` and U `[C_out, R]` hold the factors of all adapters of a layer side by side, and s holds the strength of
each adapter, once per rank. A strength of zero switches an adapter off. The product U diag(s) stays at one address and
is overwritten when a strength changes, so neither a compiled function nor a CUDA graph has to be made again.

References:
    LoRA, arXiv 2106.09685.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edadm_cli.errors import UsageError
from edadm_cli.quant.network import set_module

Strengths = Mapping[tuple[str, str], float]
"""Maps (layer, adapter) to the strength of the adapter in that layer, a number that scales U D."""


_ALIGNED = 16
"""R is padded with zeros to a multiple of this number, because a GPU multiplies a rank of 4 more slowly than 16."""


class SideBranch(nn.Module):
    """Computes the adapters of one layer, or of several layers that read one input.

    Args:
        down: The factor D, with shape `[R, C_in]` or, beside a convolution, `[R, C_in, kh, kw]`.
        up: The factor U, with shape `[C_out, R]`.
        owners: The layer, the adapter and the rank of each range of R, in order.
        stride: The stride of the convolution.
        padding: The padding of the convolution, in both directions.
        dilation: The dilation of the convolution.
    """

    def __init__(
        self,
        down: Tensor,
        up: Tensor,
        owners: Sequence[tuple[str, str, int]],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
    ) -> None:
        super().__init__()
        missing = -down.shape[0] % _ALIGNED
        self.owners = (*owners, *([("", "", missing)] if missing else []))
        self.stride, self.padding, self.dilation = stride, padding, dilation
        down = F.pad(down, (0, 0) * (down.ndim - 1) + (0, missing))
        up = F.pad(up, (0, missing))
        is_image = down.ndim == 4
        self.register_buffer("down", down.contiguous(memory_format=torch.channels_last) if is_image else down)
        self.register_buffer("unscaled_up", up)
        self.register_buffer("up", up.clone())

    down: Tensor
    unscaled_up: Tensor
    up: Tensor

    def set_strengths(self, strengths: Strengths) -> None:
        """Overwrites U diag(s) with new strengths; an adapter without a strength is switched off."""
        ranges = [torch.full((rank,), strengths.get((layer, name), 0.0)) for layer, name, rank in self.owners]
        self.up.copy_(self.unscaled_up * torch.cat(ranges).to(self.up))

    @property
    def is_convolution(self) -> bool:
        """Returns whether the branch is beside a convolution, whose inputs are images `[N, C, H, W]`."""
        return self.down.ndim == 4

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        """Returns the adapters' output, in the shape of the layer's output, plus `more` of the same shape."""
        x = x.to(self.down.dtype)
        if not self.is_convolution:
            return self.raise_to(F.linear(x, self.down), more)
        hidden = F.conv2d(x, self.down, None, self.stride, self.padding, self.dilation).permute(0, 2, 3, 1)
        return self.raise_to(hidden, None if more is None else more.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def raise_to(self, hidden: Tensor, more: Tensor | None) -> Tensor:
        """Returns U diag(s) times `hidden` `[..., R]`, plus `more` `[..., C_out]`."""
        if more is None:
            return F.linear(hidden, self.up)
        rows = torch.addmm(more.reshape(-1, more.shape[-1]), hidden.reshape(-1, hidden.shape[-1]), self.up.T)
        return rows.view(more.shape)


class AdaptedLayer(nn.Module):
    """Runs a layer and its side branch, in denoisers that run their own `forward`. It has the layer's attributes."""

    def __init__(self, base: nn.Module, branch: SideBranch) -> None:
        super().__init__()
        self.base, self.branch = base, branch

    def forward(self, x: Tensor) -> Tensor:
        """Returns the layer's output plus the output of the adapters."""
        y: Tensor = self.base(x)
        return self.branch(x, y)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


def side_by_side(branches: Sequence[SideBranch | None], widths: Sequence[int]) -> SideBranch:
    """Returns one branch for several linear layers that read one input and whose outputs are concatenated.

    Args:
        branches: The side branch of each layer; `None` for a layer without adapters. At least one is not `None`.
        widths: The number of output features of each layer.
    """
    present = [branch for branch in branches if branch is not None]
    ranks = [0 if branch is None else branch.up.shape[1] for branch in branches]
    up = present[0].up.new_zeros(sum(widths), sum(ranks))
    row = column = 0
    for branch, width, rank in zip(branches, widths, ranks, strict=True):
        if branch is not None:
            up[row : row + width, column : column + rank] = branch.unscaled_up
        row, column = row + width, column + rank
    owners = [owner for branch in present for owner in branch.owners]
    return SideBranch(torch.cat([branch.down for branch in present]), up, owners)


def take_adapters(denoiser: nn.Module) -> tuple[nn.Module, dict[str, SideBranch]]:
    """Separates a denoiser from the adapters that PEFT has put around its layers.

    Args:
        denoiser: The denoiser, which is not changed.

    Returns:
        The denoiser without adapters, which shares its tensors with `denoiser`, and the side branch of each adapted
        layer by the layer's name. If there are no adapters, `denoiser` itself is returned.

    Raises:
        UsageError: An adapter has more than two factors, such as a magnitude (DoRA) or a bias.
    """
    names = [name for name, module in denoiser.named_modules() if _is_adapted(module)]
    if not names:
        return denoiser, {}
    tensors: list[Any] = [*denoiser.parameters(), *denoiser.buffers()]
    bare = copy.deepcopy(denoiser, {id(tensor): tensor for tensor in tensors})
    branches = {}
    for name in names:
        wrapper: Any = bare.get_submodule(name)
        branch = _branch(name, wrapper)
        if branch is not None:
            branches[name] = branch
        set_module(bare, name, wrapper.base_layer)
    return bare, branches


def strengths_of(denoiser: nn.Module) -> dict[tuple[str, str], float]:
    """Returns the current strength of each active adapter in each layer, as `set_adapters` and the like have set it."""
    strengths: dict[tuple[str, str], float] = {}
    for name, module in denoiser.named_modules():
        if not _is_adapted(module):
            continue
        wrapper: Any = module
        active = () if wrapper.disable_adapters else wrapper.active_adapters
        strengths |= {
            (name, adapter): float(wrapper.scaling[adapter]) for adapter in active if adapter in wrapper.scaling
        }
    return strengths


def _is_adapted(module: nn.Module) -> bool:
    return isinstance(getattr(module, "lora_A", None), nn.ModuleDict) and hasattr(module, "base_layer")


def _branch(name: str, wrapper: Any) -> SideBranch | None:
    """Returns the side branch of one layer; `None` if all its adapters were deleted."""
    downs, ups, owners = [], [], []
    for adapter, a in wrapper.lora_A.items():
        b = wrapper.lora_B[adapter]
        if adapter in wrapper.lora_variant or b.bias is not None:
            raise UsageError(
                f"The adapter '{adapter}' is more than a LoRA at '{name}' (such as DoRA), which engines cannot run.",
                hint="run the export in torch: edadm_cli.load(FOLDER, engine='torch')",
            )
        downs.append(a.weight.detach())
        ups.append(b.weight.detach().flatten(1))
        owners.append((name, adapter, a.weight.shape[0]))
    if not downs:
        return None
    down, up = torch.cat(downs), torch.cat(ups, dim=1)
    if isinstance(a, nn.Conv2d):
        sizes: Any = (a.stride, a.padding, a.dilation)
        return SideBranch(down, up, owners, *sizes)
    return SideBranch(down, up, owners)
