"""Recipes: TOML files with the choices about calibration samples and quantization parameters.

The shipped recipes are in `edadm_cli/recipes/*.toml`. A user's file has the same fields and may extend a shipped recipe
with `extends = "default"`.

References:
    EDA-DM, arXiv 2401.04585; BRECQ, arXiv 2102.05426; QDrop, arXiv 2203.05740; AdaRound, arXiv 2004.10568.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from edadm_cli.errors import UsageError, did_you_mean, explain_field
from edadm_cli.plain_data import read_toml

RECIPE_FOLDER = Path(__file__).parent / "recipes"

LEFT_TO_MODEL = "model"

WeightRange = Literal["minmax", "search", "output-error"]
ActivationRange = Literal["minmax", "search", "search-asymmetric"]
Granularity = Literal["block", "layer", "none"]
ChannelValue = Literal["weight-scale", "bias", "input-channel-scale"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def later(default: Any, **kwargs: Any) -> Any:
    """Declares a field that earlier versions did not have; its default is their behaviour.

    Such a field is not part of an artifact's identity at its default, so that artifacts of earlier versions stay valid.
    """
    return Field(default, json_schema_extra={"later": True}, **kwargs)


def without_later_defaults(model: BaseModel, fields: dict[str, Any]) -> dict[str, Any]:
    """Returns `fields`, the dumped fields of `model`, without the later ones that are at their defaults.

    The same is done for nested tables, including those in lists.
    """
    kept = {}
    for name, value in fields.items():
        field, current = type(model).model_fields[name], getattr(model, name)
        is_later = isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("later") is True
        if not (is_later and current == field.default):
            kept[name] = _without_later_defaults(current, value)
    return kept


def _without_later_defaults(current: Any, dumped: Any) -> Any:
    if isinstance(current, BaseModel) and isinstance(dumped, dict):
        return without_later_defaults(current, dumped)
    if isinstance(current, dict):
        pairs = zip(current.values(), dumped.items(), strict=True)
        return {key: _without_later_defaults(item, plain) for item, (key, plain) in pairs}
    if isinstance(current, list | tuple):
        return [_without_later_defaults(item, plain) for item, plain in zip(current, dumped, strict=True)]
    return dumped


class CollectRecipe(_Frozen):
    """The amount of full-precision sampling, for commands that collect and quantize at once."""

    num_trajectories: int | None = Field(None, ge=1, description="trajectories; null: the model's own number")


class SelectRecipe(_Frozen):
    """The selection of the steps that calibration samples are taken from."""

    strategy: str = Field(
        "tdac", description="how samples are shared out over the steps; `edadm_cli.select.strategies`"
    )
    num_samples: int | None = later(None, ge=1, description="samples; null: one per trajectory")
    variety_weight: float | None = Field(
        None, ge=0, description="lambda of TDAC, the weight of variety against density; null: the model's own"
    )
    density_radius: float | None = Field(
        None, gt=0, description="r of TDAC, absolute, in squared feature units; null: a low quantile of the distances"
    )
    model_radius: bool = later(False, description="whether r is the model's published one, where it has one")
    density_quantile: float | None = later(
        None, gt=0, le=1, description="share of the pairs of steps within r, where no r is given; null: 0.05"
    )
    samples_per_trajectory: int = later(
        1, ge=1, le=1000, description="steps that each trajectory gives, where no size of the calibration set is given"
    )


class RangeRecipe(_Frozen):
    """The search of the quantization grids, before anything is learned."""

    weight: WeightRange = Field(
        "search",
        description="min-max; or the scale with the least error of the weights, or of the outputs that they cause",
    )
    activation: ActivationRange = "search-asymmetric"
    norm: float = Field(
        2.4, gt=0, description="exponent of the error that a searched range minimises; that of outputs is squared"
    )
    num_candidates: int = Field(100, ge=1, le=1000, description="thresholds tried by a search")
    pooled: bool = later(
        False, description="whether activations of all batches are searched together, or each batch by itself"
    )
    ema_decay: float = Field(
        0.9, ge=0, lt=1, description="share of the old value when the range of a batch by itself is merged in"
    )
    float_input_share: float = later(
        0.0,
        ge=0,
        le=1,
        description="share of the denoiser's multiplications whose layers may keep their inputs in floating point:"
        " those whose rounding changes the prediction most; 0: none",
    )
    channel_parts: bool = Field(True, description="two quantizers for the two sources of a concatenated shortcut input")


class AttentionRecipe(_Frozen):
    """The quantization of attention's two products."""

    quantize: bool = False
    probability_bits: int = Field(8, ge=2, le=8, description="bits of the softmax output, zero-point 0")


class LearnRecipe(_Frozen):
    """The settings of fine-grained block reconstruction; null stands for the model's published hyperparameter."""

    granularity: Granularity = "block"
    iterations: int | None = Field(300, ge=0, description="optimizer steps per unit")
    batch_size: int | None = Field(32, ge=1, description="rows per optimizer step")
    layer_loss_weight: float | None = Field(
        0.2, ge=0, description="gamma: weight of the losses of the layers inside a block"
    )
    relative_layer_losses: bool = Field(
        True, description="whether each layer's loss is scaled to the size of the block's output, or taken as it is"
    )
    weight_learning_rate: float | None = Field(1e-1, gt=0, description="Adam's step for the rounding variables alpha")
    activation_learning_rate: float | None = Field(1e-3, gt=0, description="Adam's step for activation scales")
    relative_scale_steps: bool = Field(
        True, description="whether the activation step is a share of each scale's first value, or an absolute number"
    )
    mixed_inputs: Literal["all", "hidden"] = later(
        "all", description="which inputs of a unit input_drop mixes: all that are floating, or the hidden state alone"
    )
    rounding_first: float = later(
        0.0,
        ge=0,
        lt=1,
        description="share of the iterations that learn rounding alone, with float activations, before the rest learn"
        " the scales alone; 0: both are learned together",
    )
    rate_decay: Literal["cosine", "constant"] = later(
        "cosine", description="how the optimizer's steps change while rounding is learned; those of scales alone decay"
    )
    input_drop: float = Field(0.0, ge=0, le=1, description="share of input elements taken from full precision (QDrop)")
    activation_drop: float = Field(0.0, ge=0, le=1, description="share of activations left unquantized while learning")
    rounding_regularizer: float = Field(1e-3, ge=0, description="weight of AdaRound's pull of h to 0 or 1; 0: off")
    rounding_sharpness: float = later(
        1.0,
        ge=1,
        le=1000,
        description="tau at the end of learning: how sharply h turns from 0 to 1; 1: AdaRound's form",
    )
    rounding_sharpness_start: float = later(0.3, ge=0, lt=1, description="share of the iterations before tau grows")
    channel_values: tuple[ChannelValue, ...] = later(
        (), description="what is learned per channel: scales of weights, biases, scales of input channels"
    )
    channel_learning_rate: float = later(
        1e-3,
        gt=0,
        description="Adam's step for values per channel, as a share of a scale or of the norm of a weight row",
    )
    network_iterations: int = later(
        0,
        ge=0,
        description="optimizer steps in which all units learn together on the error of the prediction, once each has"
        " learned by itself; 0: none",
    )
    network_samples: int = later(
        4096, ge=1, description="samples for those steps, as many of each sampler step; all of them if there are fewer"
    )
    network_batch_size: int = later(32, ge=1, description="rows of those steps")
    network_learning_rate: float = later(3e-3, gt=0, description="Adam's step for the codes in those steps, in codes")
    network_step_weights: Literal["alike", "effect"] = later(
        "alike",
        description="what the share of a sampler step's error that is left counts: alike for all steps, or as much as"
        " the error moves the final sample",
    )


class LayerRule(_Frozen):
    """The bits of layers whose names match a pattern; the last matching rule applies."""

    pattern: str = Field(description="shell pattern over the layer's dotted name, such as 'up_blocks.*.conv_shortcut'")
    weight_bits: int | None = Field(None, ge=2, le=8)
    activation_bits: int | None = Field(None, ge=2, le=8)
    exclude: bool = Field(False, description="leave the layer in floating point")
    float_input: bool = Field(False, description="quantize the layer's weights only")


class TransformRule(_Frozen):
    """A transform of the inputs of layers whose names match a pattern; the last matching rule applies.

    Layers whose input is left in float, and grouped convolutions, have no transform.
    """

    name: str = Field(description="of the transform, such as 'input-channel-scale'")
    pattern: str = Field("*", description="shell pattern over the layer's dotted name")
    options: dict[str, float] = Field({}, description="numbers that the transform takes, in place of its own")


Rule = TypeVar("Rule", LayerRule, TransformRule)


def last_match(rules: Sequence[Rule], name: str) -> Rule | None:
    """Returns the last rule whose pattern matches the dotted name of a layer; `None` if none does."""
    return next((rule for rule in reversed(rules) if fnmatchcase(name, rule.pattern)), None)


class Recipe(_Frozen):
    """All choices between full-precision trajectories and quantization parameters."""

    name: str
    description: str = ""
    collect: CollectRecipe = later(CollectRecipe())
    select: SelectRecipe = SelectRecipe()
    ranges: RangeRecipe = RangeRecipe()
    attention: AttentionRecipe = AttentionRecipe()
    learn: LearnRecipe = LearnRecipe()
    rounding: Literal["nearest", "gptq"] = later(
        "nearest", description="how weights are rounded where nothing is learned"
    )
    edge_weight_bits: int | None = Field(
        8, ge=2, le=8, description="weight bits of the first and last layer and the time embedding; null: as all"
    )
    edge_activation_bits: int | None = Field(8, ge=2, le=8, description="activation bits of those layers; null: as all")
    sample_float_input: bool = Field(
        True, description="leave the input of the first layer, the noisy sample itself, unquantized"
    )
    output_float_input: bool = Field(True, description="leave the input of the last layer unquantized")
    layers: tuple[LayerRule, ...] = ()
    transforms: tuple[TransformRule, ...] = later((), description="what happens to inputs before they are quantized")

    @model_validator(mode="after")
    def _gptq_learns_nothing(self) -> Recipe:
        if self.rounding == "gptq" and self.learn.granularity != "none":
            raise ValueError('rounding = "gptq" is for recipes with granularity = "none" in [learn]')
        return self

    @model_validator(mode="after")
    def _excluded_rules_carry_no_bits(self) -> Recipe:
        for rule in self.layers:
            if rule.exclude and (rule.weight_bits or rule.activation_bits or rule.float_input):
                raise ValueError(f"the rule for '{rule.pattern}' both excludes layers and gives them bits")
        return self


def shipped_recipes() -> list[str]:
    """Returns the names of the recipes in the package."""
    return sorted(path.stem for path in RECIPE_FOLDER.glob("*.toml"))


def load_recipe(name_or_path: str) -> Recipe:
    """Reads a shipped recipe by name or a user's recipe by path.

    Raises:
        UsageError: There is no such recipe, it is not TOML, or a field is unknown or out of range.
    """
    fields = _read(name_or_path, depth=0)
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = f"{'.'.join(map(str, first['loc']))}: " if first["loc"] else ""
        hint = did_you_mean(str(first["loc"][-1]), _field_names()) if first["type"] == "extra_forbidden" else None
        raise UsageError(f"The recipe '{name_or_path}' is not valid: {field}{explain_field(first)}.", hint) from error


def _field_names() -> set[str]:
    """Returns the names of all fields of a recipe, those of its tables among them."""
    schema = Recipe.model_json_schema()
    return {name for part in (schema, *schema["$defs"].values()) for name in part.get("properties", {})}


def _read(name_or_path: str, depth: int) -> dict[str, Any]:
    shipped = RECIPE_FOLDER / f"{name_or_path}.toml"
    path = shipped if name_or_path in shipped_recipes() else Path(name_or_path)
    if not _is_file(path):
        raise UsageError(
            f"There is no recipe '{name_or_path[:200]}': it is neither a file nor one of "
            f"{', '.join(shipped_recipes())}.",
            hint=did_you_mean(name_or_path, shipped_recipes()) or "edadm reconstruct --recipe default",
        )
    fields = _nulls(read_toml(path, "The recipe"))
    fields.setdefault("name", path.stem)
    base = fields.pop("extends", None)
    if base is None:
        return fields
    if depth >= 8:
        raise UsageError(f"The recipe {path} extends itself, or a chain of more than eight recipes.")
    is_shipped = str(base) in shipped_recipes()
    return _merge(_read(str(base) if is_shipped else str(path.parent / str(base)), depth + 1), fields)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file can have
        return False


def _nulls(table: dict[str, Any]) -> dict[str, Any]:
    """Returns a table with `None` in place of the word "model", because TOML has no null."""
    return {
        key: _nulls(value) if isinstance(value, dict) else None if value == LEFT_TO_MODEL else value
        for key, value in table.items()
    }


def _merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        both_tables = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both_tables else value
    return merged
