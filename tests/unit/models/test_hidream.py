"""HiDream's experts, whose tokens differ in number from image to image."""

from __future__ import annotations

import torch

from edadm_cli.models.denoiser_calls.call_templates import build_call
from edadm_cli.models.denoiser_calls.calls import split_call
from edadm_cli.models.families import prepare_calls
from tests.denoisers.transformers import hidream_transformer

ROWS = 3


def _call(rows: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "hidden_states": normal(rows, 4, 8, 8),
        "timesteps": torch.full((rows,), 500.0),
        "encoder_hidden_states_t5": normal(rows, 16, 32),
        "encoder_hidden_states_llama3": normal(2, rows, 16, 32),
        "pooled_embeds": normal(rows, 32),
    }


def test_all_tokens_through_every_expert_predict_what_routed_tokens_do() -> None:
    torch.manual_seed(0)
    denoiser = hidream_transformer().eval()
    call = _call(ROWS)
    counts: list[int] = []
    experts = [module for name, module in denoiser.named_modules() if name.endswith("experts.1.w1")]
    hooks = [module.register_forward_hook(lambda _, inputs, __: counts.append(len(inputs[0]))) for module in experts]
    with torch.no_grad():
        routed = denoiser(**call).sample
        num_routed, counts[:] = sum(counts), []
        prepare_calls(denoiser)
        every = denoiser(**call).sample
    for hook in hooks:
        hook.remove()
    assert sum(counts) > num_routed, "the experts still get routed tokens alone"
    torch.testing.assert_close(every, routed, rtol=1e-4, atol=1e-5)


def test_text_states_of_several_layers_are_stored_row_by_row() -> None:
    denoiser, call = hidream_transformer().eval(), _call(ROWS)
    parts = split_call(denoiser, (), call)
    name = "encoder_hidden_states_llama3"
    assert parts.condition[name].shape == (ROWS, 2, 16, 32)
    one = {key: tensor[1:2] for key, tensor in parts.condition.items()}
    _, kwargs = build_call(parts.template, parts.sample[1:2], parts.timestep, one)
    torch.testing.assert_close(kwargs[name], call[name][:, 1:2])


def test_complex_numbers_of_a_call_come_back_as_they_were() -> None:
    denoiser, call = hidream_transformer().eval(), _call(ROWS)
    angles = torch.polar(torch.ones(5, 4), torch.arange(20.0).reshape(5, 4))
    parts = split_call(denoiser, (), call | {"attention_kwargs": {"angles": angles}})
    assert not any(tensor.is_complex() for tensor in parts.tensors.values())
    _, kwargs = build_call(parts.template, parts.sample, parts.timestep, parts.tensors)
    assert torch.equal(kwargs["attention_kwargs"]["angles"], angles)
