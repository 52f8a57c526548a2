"""The contenders that a bench knows; other packages add theirs through the entry-point group `edadm.contenders`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from edadm_cli.bench.contenders.base import Contender, Preparation
from edadm_cli.bench.contenders.comfy_kitchen import ComfyKitchen
from edadm_cli.bench.contenders.float8 import Float8
from edadm_cli.bench.contenders.full_precision import OpenVinoFloat, TorchFloat
from edadm_cli.bench.contenders.nncf import Nncf
from edadm_cli.bench.contenders.sdnq import Sdnq
from edadm_cli.bench.contenders.torchao import TorchAo
from edadm_cli.bench.spec import ContenderEnvironment, Spec
from edadm_cli.errors import UsageError
from edadm_cli.plugins import with_plugins, wrong_result

GROUP = "edadm.contenders"
FLOATS: tuple[Contender, ...] = (TorchFloat(), OpenVinoFloat())
"""The contenders that every bench measures."""


@cache
def peers() -> dict[str, Contender]:
    """Returns the contenders that `--against` takes, by name.

    Raises:
        MachineError: Another package's contender cannot be loaded, or its name is in use already.
    """
    return with_plugins((Nncf(), TorchAo(), Sdnq(), ComfyKitchen(), Float8()), GROUP, Contender)


def require_peers(names: Sequence[str], device: torch.device) -> None:
    """Refuses peers that cannot run here, before any work is done.

    Raises:
        MachineError: A peer is not installed, or the device cannot run it.
        UsageError: There is no such peer, or it does not run on this kind of device.
    """
    for name in names:
        if name not in peers():
            raise UsageError(f"--against takes {', '.join(peers())}; got '{name}'.", hint="edadm bench --help")
        peers()[name].require(device)


def prepare_specs(contender: Contender, context: Preparation) -> list[Spec]:
    """Returns the forms that a contender prepares.

    Raises:
        MachineError: The contender of another package returned something else.
    """
    specs = contender.prepare(context)
    if not isinstance(specs, list) or not all(isinstance(spec, Spec) for spec in specs):
        expected = "a list of 'Spec' of edadm_cli.bench.spec"
        raise wrong_result(f"The contender '{contender.name}'", contender, specs, expected)
    return specs


def load(spec: Spec, environment: ContenderEnvironment) -> Callable[..., Any]:
    """Loads a contender from its files, in the process that runs it."""
    floats = {contender.name: contender for contender in FLOATS}
    contender = peers().get(spec.engine) or floats.get(spec.engine) or FLOATS[0]  # any engine loads its own files
    return contender.load(spec, environment)
