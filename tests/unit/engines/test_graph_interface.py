"""The inputs of a graph: what a call of the denoiser has to be given again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edadm_cli.engines.graph.interface import GraphInterface
from edadm_cli.errors import InputError
from edadm_cli.models.families import DenoiserFamily, registry


class Frames(nn.Module):
    """A denoiser that is called with a timestep for each frame, as AnyFlow is."""

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        return sample + timestep[:, :, None]


def test_a_timestep_for_each_frame_is_one_input_per_row() -> None:
    denoiser, sample = Frames(), torch.zeros(2, 5, 3)
    timesteps = torch.tensor([[7.0] * 5, [9.0] * 5])
    interface = GraphInterface.of(denoiser, (sample, timesteps), {})
    tensors = interface.tensors((sample, timesteps), {})
    assert tensors["timestep"].tolist() == [7, 9]
    assert torch.equal(denoiser(**interface.call(tensors)), denoiser(sample, timesteps))
    timesteps[1, 2] = 0
    with pytest.raises(InputError, match="different timesteps in one row"):
        interface.tensors((sample, timesteps), {})


def test_the_family_names_the_sample_and_the_timestep(monkeypatch: pytest.MonkeyPatch) -> None:
    """As read from the files of an engine, where there is no denoiser whose family could be looked up."""

    class Renamed(nn.Module):
        def forward(self, noisy: Tensor, when: Tensor) -> Tensor:
            return noisy + when[:, None]

    call = (torch.zeros(2, 3), torch.tensor([4.0, 4.0]))
    with pytest.raises(InputError, match=r"Renamed is called with \(noisy, when\)"):
        GraphInterface.of(Renamed(), call, {})
    family = DenoiserFamily("renamed", ("Renamed",), sample_arguments=("noisy",), timestep_arguments=("when",))
    monkeypatch.setattr(registry, "_registered", [family])
    written = GraphInterface.of(Renamed(), call, {}).model_dump_json()
    monkeypatch.setattr(registry, "_registered", [])
    interface = GraphInterface.model_validate_json(written)
    tensors = interface.tensors((), {"noisy": torch.ones(3, 3), "when": torch.tensor(5.0)})
    assert (tensors["sample"].shape, tensors["timestep"].tolist()) == ((3, 3), [5, 5, 5])
    assert interface.call(tensors).keys() == {"noisy", "when"}


def test_a_call_may_have_other_rows_and_omit_a_mask() -> None:
    """Qwen-Image gets a list of sizes, one per row, and its pipeline leaves the mask out where no prompt is padded."""

    class QwenImageTransformer2DModel(nn.Module):
        def forward(
            self,
            hidden_states: Tensor,
            timestep: Tensor,
            encoder_hidden_states: Tensor,
            encoder_hidden_states_mask: Tensor | None = None,
            img_shapes: Any = None,
        ) -> Tensor:
            return hidden_states

    call = (torch.zeros(2, 5, 3), torch.tensor(1.0), torch.zeros(2, 4, 3))
    shapes = [[(1, 5, 3)]]
    example = {"encoder_hidden_states_mask": torch.ones(2, 4, dtype=torch.int64), "img_shapes": shapes * 2}
    interface = GraphInterface.of(QwenImageTransformer2DModel(), call, example)
    other = (torch.zeros(1, 5, 3), call[1], torch.zeros(1, 7, 3))
    tensors = interface.tensors(other, {"encoder_hidden_states_mask": None, "img_shapes": shapes})
    assert tensors["encoder_hidden_states_mask"].tolist() == [[1] * 7]
    assert interface.call(tensors)["img_shapes"] == shapes
    with pytest.raises(InputError, match=r"called with img_shapes\.0\.1 = 9, but its graph was made for 5\.$"):
        interface.tensors(other, {"img_shapes": [[(1, 9, 3)]]})


@pytest.mark.parametrize(
    "timesteps", [torch.zeros(0, 5), torch.zeros(0), torch.tensor(7.0)], ids=["frames", "rows", "one"]
)
def test_a_call_without_rows_is_refused(timesteps: Tensor) -> None:
    """OpenVINO ends the process with such a call."""
    example = (torch.zeros(2, 5, 3), torch.full((2, 5), 7.0) if timesteps.ndim == 2 else torch.tensor(7.0))
    interface = GraphInterface.of(Frames(), example, {})
    with pytest.raises(InputError, match="called without rows"):
        interface.tensors((torch.zeros(0, 5, 3), timesteps), {})
