"""The parts of `collect`: where features are taken, and what a batch's calls must have in common."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D
from torch import Tensor, nn

from edadm_cli.collect.branches import of_calls
from edadm_cli.collect.features import record_features
from edadm_cli.collect.recorder import BatchRecorder
from edadm_cli.errors import InputError
from edadm_cli.models.denoiser_calls.calls import split_call
from edadm_cli.models.families import middle_module
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.models.loading import load_model
from edadm_cli.models.pipeline_calls.sampling import sample

CPU = torch.device("cpu")


def load(folder: Path) -> LoadedModel:
    return load_model(str(folder), CPU, torch.float32)


def test_features_enter_the_mid_blocks_attention(tiny_sd: Path, tiny_ddpm: Path, tiny_dit: Path) -> None:
    for folder in (tiny_sd, tiny_ddpm):
        denoiser = load(folder).denoiser
        assert middle_module(denoiser) is denoiser.mid_block.attentions[0]
    denoiser = load(tiny_dit).denoiser
    assert middle_module(denoiser) is denoiser.transformer_blocks[1]


def test_a_mid_block_without_attention_gives_the_input_of_its_second_residual_block() -> None:
    middle = UNetMidBlock2D(in_channels=8, temb_channels=16, add_attention=False, resnet_groups=4)
    denoiser = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        add_attention=False,
    )
    assert type(denoiser.mid_block) is type(middle)
    assert middle_module(denoiser) is denoiser.mid_block.resnets[1]


def test_a_network_without_a_middle_is_reported() -> None:
    with pytest.raises(InputError, match="neither a mid-block"):
        middle_module(nn.Linear(2, 2))


def test_tokens_are_read_with_channels_second(tiny_dit: Path) -> None:
    model, seen = load(tiny_dit), []
    with record_features(model.denoiser, seen.append):
        sample(model, seeds=[1, 2, 3], prompts=None, num_steps=2, guidance_scale=1.0)
    assert [tuple(feature.shape) for feature in seen] == [(3, 16, 4)] * 2


def test_guidance_branches_are_told_apart(tiny_sd: Path, tiny_dit: Path) -> None:
    for folder, name in ((tiny_sd, "encoder_hidden_states"), (tiny_dit, "class_labels")):
        model = load(folder)
        recorder = BatchRecorder(model, num_trajectories=3, num_features=2)
        with recorder.recording():
            sample(model, seeds=[1, 2, 3], prompts=["a", "b", "c"], num_steps=3, guidance_scale=3.0)
        assert recorder.branches == 2
        assert recorder.latents[0].shape == (3, 4, *recorder.latents[0].shape[2:])
        assert recorder.features[0].shape[0] == 4  # two trajectories in two branches
        unconditional, conditional = recorder.unconditional[name], recorder.condition[name]
        assert all(torch.equal(row, unconditional[0]) for row in unconditional)
        assert not torch.equal(conditional[0], conditional[1])
        if name == "class_labels":
            assert unconditional.tolist() == [1000] * 3


class Fake(nn.Module):
    """A denoiser that is called as a test likes."""

    def __init__(self) -> None:
        super().__init__()
        self.mid_block = nn.Identity()

    def forward(self, sample: Tensor, timestep: Any, text: Tensor | None = None, flag: Any = False) -> Tensor:
        result: Tensor = self.mid_block(sample)
        return result


def recorder_of(denoiser: nn.Module, size: int) -> BatchRecorder:
    model: Any = SimpleNamespace(denoiser=denoiser, ref=SimpleNamespace(id="fake"), pipeline=object())
    return BatchRecorder(model, size, num_features=1)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"text": torch.ones(2, 4)}, "text changes between the first step and step 1"),
        ({"text": torch.zeros(2, 3), "flag": True}, "the form of the call changes"),
        ({}, "the form of the call changes"),
    ],
)
def test_calls_that_change_their_form_over_the_steps_are_refused(second: dict[str, Any], message: str) -> None:
    denoiser = Fake()
    with recorder_of(denoiser, 2).recording():
        denoiser(torch.zeros(2, 1, 2, 2), 9, text=torch.zeros(2, 3))
        with pytest.raises(InputError, match=message):
            denoiser(torch.zeros(2, 1, 2, 2), 8, **second)


def test_a_condition_that_changes_has_a_value_per_step_in_each_branch() -> None:
    """The second sample of LTX-2, or the timestep at which a step ends: with rows, and with two calls per step."""
    sound = [torch.full((2, 3), value) for value in (1.0, 1.0, 5.0)]
    for is_in_rows in (True, False):
        denoiser = Fake()
        recorder = recorder_of(denoiser, 2)
        with recorder.recording():
            for step, values in enumerate(sound):
                latent, branches = torch.full((2, 1, 2, 2), float(step)), (values + 10, values)
                if is_in_rows:
                    denoiser(torch.cat([latent] * 2), 9 - step, text=torch.cat(branches), flag=torch.arange(4.0))
                    continue
                for prompt in (1.0, 0.0):
                    denoiser(latent, 9 - step, text=values, flag=torch.full((2, 1), prompt))
        tensors = recorder.tensors()
        assert recorder.varying.values.keys() == {"text"}
        assert tensors["condition.text"].shape == (2, 3, 3)
        assert tensors["condition.text"][0, :, 0].tolist() == [1, 1, 5]
        expected = [11, 11, 15] if is_in_rows else [1, 1, 5]
        assert tensors["condition.unconditional.text"][1, :, 0].tolist() == expected


def test_values_that_a_pipeline_writes_into_the_same_tensors_are_recorded_step_by_step() -> None:
    denoiser, text, timestep = Fake(), torch.ones(2, 3), torch.tensor(9)
    recorder = recorder_of(denoiser, 2)
    with recorder.recording():
        for value in (1.0, 2.0, 3.0):
            denoiser(torch.full((2, 1, 2, 2), value), timestep.fill_(9 - value), text=text.fill_(value))
    tensors = recorder.tensors()
    assert tensors["timesteps"].tolist() == [8, 7, 6]
    assert tensors["condition.text"][0, :, 0].tolist() == [1, 2, 3]


def test_a_prompt_that_changes_between_steps_of_two_calls_is_refused() -> None:
    denoiser = Fake()
    with recorder_of(denoiser, 2).recording():
        for value in (1.0, 0.0):
            denoiser(torch.zeros(2, 1, 2, 2), 9, text=torch.full((2, 3), value))
        with pytest.raises(InputError, match="text changes between"):
            denoiser(torch.ones(2, 1, 2, 2), 8, text=torch.full((2, 3), 2.0))


def test_a_further_call_of_a_step_is_left_out_with_a_warning() -> None:
    denoiser = Fake()
    recorder = recorder_of(denoiser, 2)
    rows = torch.cat([torch.zeros(2, 3), torch.ones(2, 3)])
    with recorder.recording():
        for timestep in (9, 8):
            denoiser(torch.zeros(4, 1, 2, 2), timestep, text=rows)
            denoiser(torch.zeros(2, 1, 2, 2), timestep, text=rows[2:], flag=True)
    assert (recorder.branches, len(recorder.latents)) == (2, 2)
    assert [feature.shape[0] for feature in recorder.features] == [2, 2]
    assert "more often per step than guidance" in recorder.warnings[0]
    assert len(recorder.warnings) == 1


def test_the_step_that_is_not_finite_is_named() -> None:
    denoiser = Fake()
    with recorder_of(denoiser, 2).recording():
        denoiser(torch.zeros(2, 1, 2, 2), 9)
        with pytest.raises(InputError, match="from step 1 on, timestep 8"):
            denoiser(torch.full((2, 1, 2, 2), float("inf")), 8)


@pytest.mark.parametrize("groups", [2, 3])
def test_branches_with_different_samples_leave_the_one_with_the_prompt(groups: int) -> None:
    """As of pipelines whose unconditional branch gets no image either."""
    denoiser = Fake()
    recorder = recorder_of(denoiser, 2)
    with recorder.recording():
        denoiser(torch.arange(2.0 * groups).reshape(-1, 1, 1, 1), 9)
    assert recorder.branches == 1
    assert recorder.latents[0].flatten().tolist() == [2.0 * groups - 2, 2.0 * groups - 1]
    assert [feature.shape[0] for feature in recorder.features] == [1]
    assert "have different samples" in recorder.warnings[0]


def test_rows_that_are_no_multiple_of_the_images_are_refused() -> None:
    denoiser = Fake()
    with recorder_of(denoiser, 2).recording(), pytest.raises(InputError, match="3 rows for 2"):
        denoiser(torch.zeros(3, 1, 2, 2), 9)


def test_two_calls_per_step_are_two_branches_with_the_prompt_first() -> None:
    denoiser = Fake()
    recorder = recorder_of(denoiser, 2)
    prompt, nothing = torch.ones(2, 3), torch.zeros(2, 3)
    samples = [torch.full((2, 1, 2, 2), value) for value in (1.0, 2.0, 2.0)]  # a step may change nothing
    with recorder.recording():
        for timestep, sample in zip((9, 8, 8), samples, strict=True):
            denoiser(sample, timestep, text=prompt)
            denoiser(sample, timestep, text=nothing)
    assert (recorder.branches, recorder.calls_per_step, len(recorder.latents)) == (2, 2, 3)
    assert torch.equal(recorder.condition["text"], prompt)
    assert torch.equal(recorder.unconditional["text"], nothing)
    assert [feature.shape[0] for feature in recorder.features] == [2, 2, 2]


def test_a_second_call_with_another_length_is_left_out_with_a_warning() -> None:
    denoiser = Fake()
    recorder = recorder_of(denoiser, 2)
    with recorder.recording():
        for timestep in (9, 8):
            denoiser(torch.zeros(2, 1, 2, 2), timestep, text=torch.ones(2, 3, 1))
            denoiser(torch.zeros(2, 1, 2, 2), timestep, text=torch.zeros(2, 4, 1))
    assert (recorder.branches, len(recorder.latents)) == (1, 2)
    assert recorder.is_guided
    assert [feature.shape[0] for feature in recorder.features] == [1, 1]
    assert "text has another size" in recorder.warnings[0]


def test_a_shorter_prompt_is_padded_where_a_mask_hides_the_padding() -> None:
    masks = {"mask": "text"}
    calls = []
    for length in (3, 5):
        text, mask = torch.ones(2, length, 4), torch.ones(2, length, dtype=torch.int64)
        arguments = {"sample": torch.zeros(2, 1), "timestep": 1, "text": text, "mask": mask}
        calls.append(split_call(nn.Module(), (), arguments))
    conditions = of_calls(*calls, masks)
    assert not isinstance(conditions, str)
    assert conditions.conditional["mask"].sum(1).tolist() == [3, 3]
    assert conditions.conditional["text"].shape == conditions.unconditional["text"].shape == (2, 5, 4)
