"""A denoiser's call survives being taken apart and put together."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edadm_cli.errors import InputError
from edadm_cli.models.denoiser_calls.call_templates import build_call, placed_tensors
from edadm_cli.models.denoiser_calls.calls import record_calls, split_call


class Denoiser(nn.Module):
    """Returns its arguments."""

    def forward(self, sample: Tensor, timestep: Any, encoder_hidden_states: Any = None, **rest: Any) -> Any:
        return sample, timestep, encoder_hidden_states, rest


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


ROWS = 3
KWARGS: dict[str, Any] = {
    "added": {
        "text": torch.arange(ROWS * 2.0).reshape(ROWS, 2),
        "deep": [{"ids": torch.arange(ROWS)}, None, 4],
    },
    "pair": (torch.ones(ROWS, 1, dtype=torch.bfloat16), "word", 1.5, True),
    "positions": torch.arange(7 * 3).reshape(7, 3),
    "scale": torch.tensor(2.0),
    "nothing": None,
    "flags": {},
    "return_dict": False,
}


@pytest.mark.parametrize("positional", [True, False])
def test_building_inverts_splitting(positional: bool) -> None:
    sample, timestep, text = torch.randn(ROWS, 4, 2, 2), torch.tensor(17), torch.randn(ROWS, 5)
    named = {"sample": sample, "timestep": timestep, "encoder_hidden_states": text}
    args, kwargs = (tuple(named.values()), KWARGS) if positional else ((), {**named, **KWARGS})

    call = split_call(Denoiser(), args, kwargs)
    template = json.loads(json.dumps(call.template))  # as it comes back from disk
    built_args, built_kwargs = build_call(template, call.sample, call.timestep, call.tensors)

    assert same(built_args, args)
    assert same(built_kwargs, kwargs)
    assert list(call.constants) == ["positions", "scale"]
    assert set(call.condition) == {"encoder_hidden_states", "added.text", "added.deep.0.ids", "pair.0"}
    assert template["dtypes"]["pair.0"] == "bfloat16"


def test_positions_of_tokens_are_shared_even_when_there_are_as_many_as_rows() -> None:
    ids, states = torch.zeros(ROWS, 3), torch.zeros(ROWS, 3)
    call = split_call(Denoiser(), (torch.zeros(ROWS, 4), 1), {"txt_ids": ids, "states": states})
    assert list(call.constants) == ["txt_ids"]
    assert list(call.condition) == ["states"]


class Kandinsky5Transformer3DModel(Denoiser):
    """Belongs to a family by its name."""


def test_positions_in_a_list_are_shared_even_when_there_are_as_many_as_rows() -> None:
    positions = [torch.arange(ROWS), torch.arange(4), torch.arange(ROWS)]
    kwargs = {"visual_rope_pos": positions, "text_rope_pos": torch.arange(ROWS)}
    call = split_call(Kandinsky5Transformer3DModel(), (torch.zeros(ROWS, 4), 1), kwargs)
    assert not call.condition
    assert len(call.constants) == 4


@pytest.mark.parametrize(
    "timestep",
    [
        5,
        torch.tensor(5),
        torch.tensor([5]),
        torch.full((ROWS,), 5),
        torch.full((ROWS,), 5, dtype=torch.int32),
    ],
)
def test_every_form_of_one_timestep_is_read(timestep: Any) -> None:
    call = split_call(Denoiser(), (torch.zeros(ROWS, 1), timestep), {})
    assert call.timestep.shape == ()
    assert call.timestep.dtype == torch.int64
    assert int(call.timestep) == 5


def test_a_fractional_timestep_keeps_its_fraction() -> None:
    call = split_call(Denoiser(), (torch.zeros(ROWS, 1), 0.25), {})
    assert call.timestep.dtype == torch.float32
    assert float(call.timestep) == 0.25


def test_timesteps_that_differ_between_rows_are_refused() -> None:
    with pytest.raises(InputError, match="different timesteps"):
        split_call(Denoiser(), (torch.zeros(2, 1), torch.tensor([1, 2])), {})


def test_what_is_no_data_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"extra\.0\.x of type object"):
        split_call(Denoiser(), (torch.zeros(2, 1), 1), {"extra": [{"x": object()}]})


def test_recording_sees_each_call_and_ends_with_its_context() -> None:
    denoiser, calls = Denoiser(), []
    with record_calls(denoiser, calls.append):
        denoiser(torch.zeros(1, 1), 3)
        denoiser(torch.zeros(1, 1), timestep=2)
    denoiser(torch.zeros(1, 1), 1)
    assert [int(call.timestep) for call in calls] == [3, 2]
    assert not denoiser._forward_pre_hooks


def test_lists_of_rows_survive_with_their_lengths() -> None:
    """Z-Image is called with one tensor per image, and with prompts of different length."""
    sample = [torch.randn(2, 1, 4, 4) for _ in range(ROWS)]
    prompts = [torch.randn(length, 5) for length in (2, 4, 3)]
    call = split_call(nn.Module(), (), {"x": sample, "t": torch.tensor(0.5), "cap_feats": prompts})
    assert call.sample.shape == (ROWS, 2, 1, 4, 4)
    assert call.condition["cap_feats"].shape == (ROWS, 4, 5)
    template = json.loads(json.dumps(call.template))
    assert placed_tensors(template["kwargs"]) == set(template["dtypes"])
    _, kwargs = build_call(template, call.sample, call.timestep, call.tensors)
    assert same(kwargs["x"], sample)
    assert same(kwargs["cap_feats"], prompts)


def test_a_mask_that_a_pipeline_leaves_out_is_recorded_as_ones() -> None:
    class QwenImageTransformer2DModel(nn.Module):
        pass

    kwargs = {"hidden_states": torch.zeros(2, 3, 4), "timestep": 1.0, "encoder_hidden_states": torch.zeros(2, 7, 4)}
    call = split_call(QwenImageTransformer2DModel(), (), {**kwargs, "encoder_hidden_states_mask": None})
    assert call.condition["encoder_hidden_states_mask"].tolist() == [[1] * 7] * 2


def test_a_timestep_with_several_values_per_row_keeps_its_form() -> None:
    """AnyFlow is called with a timestep for each frame."""
    call = split_call(nn.Module(), (), {"sample": torch.zeros(2, 3, 4), "timestep": torch.full((2, 5), 7.0)})
    assert call.timestep.item() == 7
    _, kwargs = build_call(call.template, torch.zeros(4, 3, 4), torch.tensor([1.0, 1.0, 2.0, 2.0]), {})
    assert kwargs["timestep"].tolist() == [[1.0] * 5] * 2 + [[2.0] * 5] * 2
    _, kwargs = build_call(call.template, torch.zeros(4, 3, 4), torch.tensor(3.0), {})
    assert kwargs["timestep"].shape == (4, 5)


@pytest.mark.parametrize("shape", ["5", [-1], [2.0], [True]])
def test_a_stored_timestep_whose_shape_is_none_is_refused(shape: Any) -> None:
    with pytest.raises(ValueError, match="not a list of sizes"):
        placed_tensors({"timestep": {"$timestep": shape}})
