"""What the configurations of all stages share: how a field is written, and what all stages take."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from edadm_cli.recipe import without_later_defaults

Identity = Literal["always", "if_changed", "never"]
"""When a field enters the identity of an artifact: always; only with another value than its default, as fields do that
came after artifacts without them; or never, since it says where or how fast a stage runs and not what it computes."""


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
    """Returns a field of a configuration, together with what the command line knows of it.

    Args:
        default: The default value; `...` where there is none.
        description: One sentence, which is the help text of the flag as well.
        identity: When the field enters the identity of an artifact.
        metavar: How the help names the value; by default its type.
        flags: Spellings of the flag; by default the name of the field.
        split: Whether one value of the flag may hold several items with commas between them.
        limits: Limits that pydantic checks, such as `ge=1`.
    """
    facts: dict[str, Any] = {"identity": identity, "metavar": metavar, "flags": list(flags), "split": split}
    facts["later"] = identity == "if_changed"  # as `recipe.later` marks a field of a recipe
    return Field(default, description=description, json_schema_extra=facts, **limits)


class StageConfig(BaseModel):
    """What every stage takes."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    seed: int = setting(0, "Seed of everything random; 0 by default.", ge=0, lt=2**63)
    device: str = setting("auto", "cpu, cuda, cuda:N, or auto: cuda if there is a GPU, else cpu.", identity="never")

    def identity_fields(self) -> dict[str, Any]:
        """Returns the fields that decide the result, as JSON values, without the seed, which the manifest names."""
        never = {name for name in type(self).model_fields if field_facts(type(self), name)["identity"] == "never"}
        return without_later_defaults(self, self.model_dump(mode="json", exclude=never | {"seed"}))


def field_facts(config: type[StageConfig], name: str) -> dict[str, Any]:
    """Returns what `setting` recorded of a field, or its defaults for a field that was made without it."""
    extra = config.model_fields[name].json_schema_extra
    defaults: dict[str, Any] = {"identity": "always", "metavar": None, "flags": [], "split": False}
    return {**defaults, **extra} if isinstance(extra, dict) else defaults
