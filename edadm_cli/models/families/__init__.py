"""What the tool knows of each family of denoisers: one module per family. No other module names an architecture."""

from edadm_cli.models.families.blocks import block_kinds, middle_module, outermost_blocks
from edadm_cli.models.families.family import Call, DenoiserFamily, UnitKind
from edadm_cli.models.families.registry import families, family_named, family_of, prepare_calls, register
from edadm_cli.models.families.values import ExampleValues

__all__ = [
    "Call",
    "DenoiserFamily",
    "ExampleValues",
    "UnitKind",
    "block_kinds",
    "families",
    "family_named",
    "family_of",
    "middle_module",
    "outermost_blocks",
    "prepare_calls",
    "register",
]
