"""Tokens of a prompt that its mask hides are left out, and the prediction stays the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from edadm_cli.bench.workload import workload
from edadm_cli.engines.base import Engine, EngineOptions
from edadm_cli.engines.graph.interface import GraphInterface
from edadm_cli.engines.openvino import OpenVinoEngine
from edadm_cli.engines.openvino.denoiser import OpenVinoDenoiser
from edadm_cli.engines.openvino.hidden_tokens import without_hidden_tokens
from edadm_cli.engines.parity import relative_l2
from edadm_cli.engines.reference import ReferenceEngine, use_arithmetic
from tests.denoisers.families import quantized_denoiser, tiny_denoiser

MASK, STATES = "encoder_attention_mask", "encoder_hidden_states"
PIXART = GraphInterface(denoiser="PixArtTransformer2DModel", parameters=(), arguments={}, inputs=())


def mask_of(*lengths: int, total: int = 300) -> Tensor:
    """Returns a mask of prompts with the given numbers of tokens."""
    return (torch.arange(total) < torch.tensor(lengths)[:, None]).float()


def remaining(mask: Tensor, interface: GraphInterface = PIXART) -> int:
    inputs = without_hidden_tokens(interface, {STATES: torch.zeros(*mask.shape[:2], 8), MASK: mask})
    assert inputs[STATES].shape[1] == inputs[MASK].shape[1]
    return inputs[STATES].shape[1]


@pytest.mark.parametrize(
    ("lengths", "tokens"), [((20, 3), 64), ((64, 1), 64), ((65, 1), 128), ((300, 20), 300), ((20, 0), 300)]
)
def test_as_many_tokens_remain_as_the_longest_prompt_needs(lengths: tuple[int, ...], tokens: int) -> None:
    assert remaining(mask_of(*lengths)) == tokens


def test_only_plain_masks_of_known_denoisers_hide_tokens() -> None:
    mask = mask_of(20, 3)
    assert remaining(mask.flip(1)) == 300  # the padding is at the beginning
    assert remaining(mask - 0.5) == 300
    assert remaining(mask[:, None]) == 1  # a bias `[rows, 1, tokens]`
    assert remaining(mask, PIXART.model_copy(update={"has_read_sizes": True})) == 300
    assert remaining(mask, PIXART.model_copy(update={"denoiser": "HunyuanDiT2DModel"})) == 300


def test_the_work_of_attention_is_counted_without_hidden_tokens() -> None:
    denoiser, (args, kwargs) = tiny_denoiser("pixart", rows=2)
    hidden = kwargs | {MASK: mask_of(20, 3), STATES: torch.zeros(2, 300, kwargs[STATES].shape[-1])}

    def keys(engine: Engine) -> set[int]:
        items = workload(denoiser, *engine.computed_call(denoiser, args, hidden))
        return {item.n for item in items if item.kind == "cross_attention"}

    assert keys(OpenVinoEngine()) == {64}
    assert keys(ReferenceEngine()) == {300}


@torch.no_grad()
def test_the_prediction_is_the_same() -> None:
    denoiser, (args, kwargs) = quantized_denoiser("pixart")
    compiled = OpenVinoEngine().compile(denoiser, args, kwargs, EngineOptions(torch.device("cpu"), num_threads=1))
    assert isinstance(compiled, OpenVinoDenoiser)
    prediction = compiled(*args, **kwargs).sample
    states, mask = kwargs[STATES].clone(), kwargs[MASK]
    states[mask == 0] += 1
    assert torch.equal(compiled(*args, **kwargs | {STATES: states}).sample, prediction)
    bias = (1 - mask[:, None]) * -10000.0  # the same mask in another form, with which nothing is left out
    whole = OpenVinoEngine().compile(denoiser, args, kwargs | {MASK: bias}, EngineOptions(torch.device("cpu")))
    assert relative_l2(whole(*args, **kwargs | {MASK: bias}).sample, prediction) < 1e-6
    use_arithmetic(denoiser, "integer")
    assert relative_l2(prediction, denoiser(*args, **kwargs).sample) < 0.1
