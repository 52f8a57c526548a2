"""Attention step by step gives what diffusers gives, and quantized operands are on their grids."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from edadm_cli.quant.attention import OPERANDS, AttentionProducts, QuantizedAttention, operand_grid
from edadm_cli.quant.plan import AttentionPlan

BLOCKS: dict[str, tuple[dict[str, Any], tuple[int, ...], bool]] = {
    "self": ({}, (2, 10, 16), False),
    "cross": ({"cross_attention_dim": 12, "bias": True}, (2, 10, 16), True),
    "cross, normed": ({"cross_attention_dim": 12, "cross_attention_norm": "layer_norm"}, (2, 10, 16), True),
    "spatial": (
        {"norm_num_groups": 4, "residual_connection": True, "bias": True, "rescale_output_factor": 1.4},
        (2, 16, 3, 5),
        False,
    ),
    "upcast": ({"upcast_attention": True, "upcast_softmax": True}, (2, 10, 16), False),
}


def _attention(fields: dict[str, Any]) -> Attention:
    torch.manual_seed(3)
    return Attention(query_dim=16, heads=4, dim_head=4, processor=AttnProcessor2_0(), **fields).eval()


def _inputs(shape: tuple[int, ...], cross: bool) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(4)
    context = torch.randn(2, 7, 12, generator=generator) if cross else None
    return {
        "hidden_states": torch.randn(shape, generator=generator) * 3,
        "encoder_hidden_states": context,
    }


@pytest.mark.parametrize(("fields", "shape", "cross"), BLOCKS.values(), ids=BLOCKS.keys())
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_it_computes_what_diffusers_computes(
    fields: dict[str, Any], shape: tuple[int, ...], cross: bool, masked: bool
) -> None:
    attention, inputs = _attention(fields), _inputs(shape, cross)
    mask = None
    if masked:
        tokens = 7 if cross else (shape[1] if len(shape) == 3 else shape[2] * shape[3])
        mask = torch.zeros(2, 1, tokens)
        mask[:, :, -2:] = -10_000.0
    expected = attention(**inputs, attention_mask=mask)
    attention.set_processor(AttentionProducts())
    actual = attention(**inputs, attention_mask=mask)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


class _Seen(QuantizedAttention):
    def on_operand(self, operand: str, tensor: Tensor) -> Tensor:
        result = super().on_operand(operand, tensor)
        self.seen[operand] = (tensor, result)
        return result

    seen: dict[str, tuple[Tensor, Tensor]]


def _scales() -> dict[str, Tensor]:
    return {"q": torch.tensor(0.05), "k": torch.tensor(0.04), "v": torch.tensor(0.1), "p": torch.tensor(1 / 255)}


@torch.no_grad()
def test_every_operand_of_both_products_lies_on_its_grid() -> None:
    plan = AttentionPlan(activation_bits=4)
    attention, inputs = _attention({}), _inputs((2, 10, 16), cross=False)
    processor = _Seen(plan, _scales())
    processor.seen = {}
    attention.set_processor(processor)
    attention(**inputs)
    assert set(processor.seen) == set(OPERANDS)
    for operand, (before, after) in processor.seen.items():
        scale, grid = _scales()[operand], operand_grid(plan, operand)
        codes = after / scale
        torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
        assert codes.min() >= grid.quant_min - 1e-4
        assert codes.max() <= grid.quant_max + 1e-4
        assert not torch.equal(before, after)
    p = processor.seen["p"][1]
    assert p.shape == (8, 10, 10), "[batch * heads, tokens, tokens]"
    assert p.min() >= 0


def test_probabilities_have_eight_bits_whatever_the_activations_have() -> None:
    for bits in (2, 4, 8):
        plan = AttentionPlan(activation_bits=bits)
        assert operand_grid(plan, "p").num_bits == 8
        assert operand_grid(plan, "p").quant_min == 0
        assert operand_grid(plan, "q").num_bits == bits
        assert operand_grid(plan, "q").quant_min < 0


@torch.no_grad()
def test_fine_grids_change_little_and_coarse_ones_much() -> None:
    inputs, errors = _inputs((2, 10, 16), cross=False), []
    exact = _attention({})(**inputs)
    for bits, q in ((8, 0.05), (3, 1.5)):
        attention = _attention({})
        scales = {**{name: torch.tensor(q) for name in "qkv"}, "p": torch.tensor(1 / 255)}
        attention.set_processor(QuantizedAttention(AttentionPlan(activation_bits=bits), scales))
        errors.append(float((attention(**inputs) - exact).norm() / exact.norm()))
    assert errors[0] < 0.03
    assert errors[1] > 5 * errors[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_leaves_scales_alone(dtype: torch.dtype) -> None:
    attention = _attention({})
    attention.set_processor(QuantizedAttention(AttentionPlan(activation_bits=8), _scales()))
    attention.to(dtype)
    for operand, scale in _scales().items():
        actual = getattr(attention.processor, f"{operand}_scale")
        assert actual.dtype == torch.float32
        assert torch.equal(actual, scale)
    assert {f"processor.{operand}_scale" for operand in OPERANDS} <= set(attention.state_dict())


class _Hook(ModelHook):
    """Puts scales in place before, as offloading does, and takes them away after."""

    def __init__(self, scales: dict[str, Tensor]) -> None:
        self.scales, self.calls = scales, 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.calls += 1
        assert not any(hasattr(value, "to") for value in (*args, *kwargs.values())), "would be moved"
        for operand, scale in self.scales.items():
            module._buffers[f"{operand}_scale"] = scale
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        for operand in self.scales:
            module._buffers[f"{operand}_scale"] = torch.ones((), device="meta")
        return output


@torch.no_grad()
def test_hooks_have_the_scales_in_place_once_a_call() -> None:
    """accelerate and diffusers exchange `forward`; diffusers passes on what the signature of `__call__` names."""
    attention, inputs = _attention({}), _inputs((2, 10, 16), cross=False)
    processor = QuantizedAttention(AttentionPlan(activation_bits=8), _scales())
    attention.set_processor(processor)
    expected, hook = attention(**inputs), _Hook(_scales())
    add_hook_to_module(processor, hook)
    hook.post_forward(processor, None)
    assert torch.equal(attention(**inputs), expected)
    assert hook.calls == 1
    assert "temb" in inspect.signature(processor.__call__).parameters
