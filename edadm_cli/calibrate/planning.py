"""Plans which layers are quantized and to how many bits, with the reasons for those left in float."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn

from edadm_cli.bits import LARGEST_GROUPED_BITS
from edadm_cli.config import BitWidth
from edadm_cli.errors import UsageError
from edadm_cli.models.families.attention import products_refusal
from edadm_cli.models.units import Trace, TracedLayer
from edadm_cli.quant.operation import Operation
from edadm_cli.quant.plan import AttentionPlan, LayerPlan, QuantizationPlan
from edadm_cli.quant.transforms import transform_named
from edadm_cli.recipe import LayerRule, Recipe, last_match


def plan_network(traced: Trace, recipe: Recipe, bits: BitWidth) -> QuantizationPlan:
    """Returns the plan of every layer that ran.

    Raises:
        UsageError: A pattern of the recipe matches no layer, a transform is not known, or the recipe leaves no layer to
            quantize.
    """
    _every_pattern_matches(traced, recipe)
    first, last = _ends(traced)
    layers: dict[str, LayerPlan] = {}
    kept = dict.fromkeys(traced.not_run, "never runs")
    kept |= dict.fromkeys(traced.repeated, "runs more than once per forward")
    kept |= traced.left_out
    kept |= {name: f"layers of type {kind} are not quantized" for name, kind in traced.unsupported.items()}
    for layer in traced.layers:
        rule = layer_rule(layer.name, recipe)
        reason = _refusal(layer, rule)
        if reason is not None:
            kept[layer.name] = reason
            continue
        is_edge = layer.name in (first, last) or layer.in_time_embedding
        float_input = (
            rule.float_input
            or (recipe.sample_float_input and layer.name == first)
            or (recipe.output_float_input and layer.name == last)
        )
        weight_bits, activation_bits = _bits(rule, recipe, bits, is_edge)
        layers[layer.name] = LayerPlan(
            weight_bits=weight_bits,
            group_size=bits.group_size if weight_bits <= LARGEST_GROUPED_BITS else None,
            activation_bits=None if float_input else activation_bits,
            channel_parts=_parts(layer, recipe),
            transform=None if float_input else _transform(layer, recipe),
        )
    if not layers:
        raise UsageError(
            f"The recipe '{recipe.name}' leaves no layer to quantize.",
            hint="edadm reconstruct --recipe default",
        )
    attentions, refused = _attentions(traced, recipe, bits)
    return QuantizationPlan(layers=layers, attentions=attentions, kept={**kept, **refused})


def _attentions(traced: Trace, recipe: Recipe, bits: BitWidth) -> tuple[dict[str, AttentionPlan], dict[str, str]]:
    """Returns the plans of attention products, and those that cannot be quantized with the reason."""
    if not recipe.attention.quantize:
        return {}, {}
    refusals = {name: products_refusal(module) for name, module in traced.attentions.items()}
    plan = AttentionPlan(activation_bits=bits.activation, probability_bits=recipe.attention.probability_bits)
    return (
        {name: plan for name, reason in refusals.items() if reason is None},
        {name: reason for name, reason in refusals.items() if reason is not None},
    )


def count(plan: QuantizationPlan, traced: Trace) -> dict[str, int]:
    """Returns how many layers of each kind and how many attention products a plan quantizes."""
    kinds = {layer.name: "conv2d" if isinstance(layer.module, nn.Conv2d) else "linear" for layer in traced.layers}
    planned = [kinds[name] for name in plan.layers]
    return {
        "conv2d": planned.count("conv2d"),
        "linear": planned.count("linear"),
        "attention_products": 2 * len(plan.attentions),
    }


def _ends(traced: Trace) -> tuple[str, str]:
    """Returns the names of the layer that the noisy sample enters and of the one that the prediction leaves.

    These are the first and the last convolution of a UNet, or the patch embedding and the last linear layer of a
    transformer.
    """
    if not traced.layers:
        return "", ""
    convolutions = (layer for layer in traced.layers if isinstance(layer.module, nn.Conv2d))
    return next(convolutions, traced.layers[0]).name, traced.layers[-1].name


def _parts(layer: TracedLayer, recipe: Recipe) -> tuple[int, ...] | None:
    """Returns a layer's channel parts; a grouped convolution has none: its groups split the weight another way."""
    is_grouped = Operation.of(layer.module).groups != 1
    return layer.channel_parts if recipe.ranges.channel_parts and not is_grouped else None


def _transform(layer: TracedLayer, recipe: Recipe) -> str | None:
    """Returns the transform of a layer's input; a grouped convolution has none: its weight has no row per channel."""
    rule = last_match(recipe.transforms, layer.name)
    if rule is None or Operation.of(layer.module).groups != 1:
        return None
    return transform_named(rule.name).name


def layer_rule(name: str, recipe: Recipe) -> LayerRule:
    """Returns the rule of the recipe that decides on the bits of a layer; one without any bits if none matches."""
    return last_match(recipe.layers, name) or LayerRule(pattern="*")


def _refusal(layer: TracedLayer, rule: LayerRule) -> str | None:
    if rule.exclude:
        return f"excluded by the recipe's pattern '{rule.pattern}'"
    try:
        Operation.of(layer.module)
    except TypeError as error:
        return str(error)
    return None


def _bits(rule: LayerRule, recipe: Recipe, bits: BitWidth, is_edge: bool) -> tuple[int, int]:
    weight = recipe.edge_weight_bits if is_edge and recipe.edge_weight_bits is not None else bits.weight
    activation = recipe.edge_activation_bits if is_edge and recipe.edge_activation_bits is not None else bits.activation
    return rule.weight_bits or weight, rule.activation_bits or activation


def _every_pattern_matches(traced: Trace, recipe: Recipe) -> None:
    for pattern in [rule.pattern for rule in recipe.layers] + [rule.pattern for rule in recipe.transforms]:
        if not any(fnmatchcase(name, pattern) for name in traced.names):
            raise UsageError(
                f"The pattern '{pattern}' of the recipe '{recipe.name}' matches none of the"
                f" {len(traced.names)} layers.",
                hint="edadm inspect lists the layers of a reconstruction",
            )
