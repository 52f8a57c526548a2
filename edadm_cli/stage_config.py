"""The shared parts of the stages' configurations: `setting`, which creates a field, and the fields of all stages."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from edadm_cli.recipe import without_later_defaults

DTypeName = Literal["float32", "bfloat16", "float16"]
Weights = Literal["auto", "memory", "disk"]
MAX_IMAGES = 1_000_000
"""Number of images of one seed that have different noise (`image_seed` in `models/pipeline_calls/seeds.py`)."""
SIZE_ARGUMENTS = ("height", "width", "num_frames")
"""Fields of the size of what a pipeline samples; they have the names of the arguments of its call."""
RECIPE_NAMES = (
    "default, default-attention, thorough, network-wise, uniform-steps, normal-steps, paper, q-diffusion, ptq4dm, gptq,"
    " quick, rtn, or your own TOML file"
)
"""Values of the flag `--recipe`, for help texts."""

Identity = Literal["always", "if_changed", "never"]
"""When a field is part of an artifact's identity.

`always`; `if_changed`, only if its value is not the default, for fields that older artifacts do not have; or `never`,
for fields that decide where or how fast a stage runs and not what it computes."""


def setting(
    default: Any,
    description: str,
    *,
    identity: Identity = "always",
    metavar: str | None = None,
    flags: tuple[str, ...] = (),
    split: bool = False,
    **limits: Any,
) -> Any:
    """Returns a field of a configuration, together with the facts that the command line needs.

    Args:
        default: The default value; `...` where there is none.
        description: One sentence, which is the help text of the flag as well.
        identity: When the field is part of an artifact's identity.
        metavar: Name of the value in the help; by default its type.
        flags: Spellings of the flag; by default the name of the field.
        split: Whether one value of the flag may hold several items with commas between them.
        limits: Limits that pydantic checks, such as `ge=1`.
    """
    facts: dict[str, Any] = {"identity": identity, "metavar": metavar, "flags": list(flags), "split": split}
    facts["later"] = identity == "if_changed"  # as `recipe.later` marks a field of a recipe
    return Field(default, description=description, json_schema_extra=facts, **limits)


class StageConfig(BaseModel):
    """The fields of every stage."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    seed: int = setting(0, "Seed of everything random; 0 by default.", ge=0, lt=2**63)
    device: str = setting(
        "auto",
        "Device that computes: cpu, cuda, cuda:N, or auto, the default: cuda if there is a GPU, else cpu.",
        identity="never",
    )

    def identity_fields(self) -> dict[str, Any]:
        """Returns the fields that decide the result, as JSON values, without the seed, which the manifest has too."""
        never = {name for name in type(self).model_fields if field_facts(type(self), name)["identity"] == "never"}
        return without_later_defaults(self, self.model_dump(mode="json", exclude=never | {"seed"}))


def field_facts(config: type[StageConfig], name: str) -> dict[str, Any]:
    """Returns the facts that `setting` recorded about a field, or defaults for a field created without it."""
    extra = config.model_fields[name].json_schema_extra
    defaults: dict[str, Any] = {"identity": "always", "metavar": None, "flags": [], "split": False}
    return {**defaults, **extra} if isinstance(extra, dict) else defaults
