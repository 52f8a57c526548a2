"""Batches whose prompts were padded to different lengths make one set, or are refused; rows are never cut elsewhere."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from edadm_cli.artifacts import load_tensors
from edadm_cli.collect.recorder import BatchRecorder
from edadm_cli.collect.shards import merge_parts, require_mergeable, write_shard
from edadm_cli.collect.varying import Varying
from edadm_cli.errors import InputError
from edadm_cli.models.denoiser_calls.calibration import CallForm
from edadm_cli.models.denoiser_calls.call_templates import build_call

STEPS, WIDTH = 2, 3


def states(lengths: list[int]) -> Tensor:
    """Returns states of prompts with these numbers of tokens, different for each token, padded with zeros."""
    padded = torch.zeros(len(lengths), max(lengths), WIDTH)
    for row, length in enumerate(lengths):
        padded[row, :length] = torch.arange(1, length + 1)[:, None] + 100.0 * length
    return padded


def mask(lengths: list[int]) -> Tensor:
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


def write(folder: Path, index: int, condition: dict[str, Tensor], **literals: Any) -> None:
    rows = len(next(iter(condition.values())))
    template = {
        "args": [],
        "kwargs": {"sample": {"$sample": None}, "timestep": {"$timestep": None}}
        | {name: {"$tensor": name} for name in condition}
        | literals,
        "constants": [],
        "dtypes": {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in sorted(condition.items())},
    }
    tokens = next(iter(condition.values())).shape[1]
    recorder = SimpleNamespace(
        branches=1,
        control_form=lambda: None,
        rows=rows,
        template=template,
        latents=[torch.zeros(rows, 4)] * STEPS,
        varying=Varying(),
        tensors=lambda: (
            {f"condition.{name}": tensor for name, tensor in condition.items()}
            | {"timesteps": torch.arange(STEPS), "features": torch.ones(STEPS, rows, 2, tokens)}
        ),
    )
    write_shard(folder, index, cast(BatchRecorder, recorder), "float32")


def merged(folder: Path, count: int) -> tuple[dict[str, Tensor], CallForm]:
    require_mergeable(folder, 0, count - 1)
    merge_parts(folder, count)
    form = CallForm.model_validate_json((folder / "call.json").read_text())
    return load_tensors(folder / "condition.safetensors"), form


BATCHES = ([5, 2], [3, 3], [1, 4])
LENGTHS = [length for batch in BATCHES for length in batch]


@pytest.mark.parametrize("left_out", ["never", "where nothing is padded"])
def test_states_are_padded_with_their_mask_as_one_batch_of_all_would_be(tmp_path: Path, left_out: str) -> None:
    for index, lengths in enumerate(BATCHES):
        condition, literals = {"states": states(lengths), "states_mask": mask(lengths)}, {}
        if left_out != "never" and len(set(lengths)) == 1:
            del condition["states_mask"]
            literals = {"states_mask": None}
        write(tmp_path, index, condition, **literals)
    tensors, form = merged(tmp_path, len(BATCHES))
    assert torch.equal(tensors["condition.states"], states(LENGTHS))
    assert torch.equal(tensors["condition.states_mask"], mask(LENGTHS))
    assert form.template.kwargs["states_mask"] == {"$tensor": "states_mask"}
    features = load_tensors(tmp_path / "features.safetensors")["features"]
    assert features.shape == (STEPS, len(LENGTHS), 2, max(LENGTHS))
    assert torch.equal(features[:, 0, :, : BATCHES[0][0]], torch.ones(STEPS, 2, 5))
    assert features[:, 2, :, 3:].abs().max() == 0


@pytest.mark.parametrize(("name", "is_known"), [("text_lens", True), ("text_ids", False)])
def test_states_are_padded_with_the_numbers_of_their_tokens(tmp_path: Path, name: str, is_known: bool) -> None:
    for index, lengths in enumerate(BATCHES):
        write(tmp_path, index, {"text_bth": states(lengths), name: torch.tensor(lengths)})
    if is_known:
        tensors, _ = merged(tmp_path, len(BATCHES))
        assert torch.equal(tensors["condition.text_bth"], states(LENGTHS))
        assert tensors[f"condition.{name}"].tolist() == LENGTHS
    else:
        with pytest.raises(InputError, match="The length of 'text_bth' differs"):
            merged(tmp_path, len(BATCHES))


def test_single_prompts_get_the_mask_that_the_pipeline_left_out(tmp_path: Path) -> None:
    for index, length in enumerate((2, 5, 3)):
        write(tmp_path, index, {"states": states([length])}, states_mask=None)
    tensors, _ = merged(tmp_path, 3)
    assert torch.equal(tensors["condition.states"], states([2, 5, 3]))
    assert torch.equal(tensors["condition.states_mask"], mask([2, 5, 3]))


@pytest.mark.parametrize(
    "second",
    [
        {"states": states([6, 6])},  # no mask: 4 + 2 * 6 tokens could be cut into rows of 4 without anyone noticing
        {"states": states([6, 6]), "mask": mask([6, 6]).flip(1) * 2},
        {"states": torch.zeros(2, 4, WIDTH + 1), "mask": mask([4, 4])},
        {"states": states([4, 4]).half(), "mask": mask([4, 4])},
        {"states": states([6, 2]), "mask": mask([6, 2]).flip(1)},  # padded on the left
    ],
)
def test_what_cannot_be_padded_is_refused_after_the_second_batch(tmp_path: Path, second: dict[str, Tensor]) -> None:
    write(tmp_path, 0, {name: {"states": states([4, 4]), "mask": mask([4, 4])}[name] for name in second})
    write(tmp_path, 1, second)
    with pytest.raises(InputError, match=r"batch 1|between batches") as caught:
        require_mergeable(tmp_path, 0, 1)
    assert caught.value.hint is not None
    assert "batch-size" in caught.value.hint


def test_a_list_with_an_item_per_row_fits_every_batch(tmp_path: Path) -> None:
    shape = [{"$tuple": [1, 8, 8]}]
    write(tmp_path, 0, {"states": states([4, 4])}, sizes=[shape, shape], kind="x")
    write(tmp_path, 1, {"states": states([4])}, sizes=[shape], kind="x")
    _, form = merged(tmp_path, 2)
    _, kwargs = build_call(form.template.model_dump(), torch.zeros(3, 4), torch.tensor(1), {"states": torch.zeros(3)})
    assert kwargs["sizes"] == [[(1, 8, 8)]] * 3
    write(tmp_path, 2, {"states": states([4])}, sizes=[shape], kind="y")
    with pytest.raises(InputError, match="called differently in batch 2"):
        require_mergeable(tmp_path, 0, 2)
