"""Qwen-Image 2.1 with two timesteps per row: the same predictions, from tensors whose rows are those of the call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edadm_cli.hooks import Hooks
from edadm_cli.models.denoiser_calls.call_templates import build_call
from edadm_cli.models.denoiser_calls.calls import DenoiserCall, record_calls
from edadm_cli.models.families import prepare_calls
from tests.denoisers.recent import qwen_image21


@torch.no_grad()
def test_prepared_blocks_count_rows_and_predict_the_same() -> None:
    torch.manual_seed(0)
    pipeline = qwen_image21()
    pipeline.set_progress_bar_config(disable=True)
    denoiser, calls = pipeline.transformer.eval(), list[DenoiserCall]()
    sizes = {"height": 64, "width": 64, "num_inference_steps": 1, "output_type": "latent"}
    with record_calls(denoiser, calls.append):
        pipeline(prompt=["a cat", "two dogs"], true_cfg_scale=1.0, use_kv_cache=False, **sizes)
    call = calls[0]
    args, kwargs = build_call(call.template, call.sample, call.timestep.expand(2), call.tensors)
    expected = denoiser(*args, **kwargs)[0]
    prepare_calls(denoiser)
    prepare_calls(denoiser)  # once is enough
    seen: list[tuple[int, ...]] = []

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(tuple(inputs[0].shape))

    with Hooks() as hooks:
        for layer in (denoiser.time_text_embed.timestep_embedder.linear_1, denoiser.norm_out.linear):
            hooks.before(layer, before)
        actual = denoiser(*args, **kwargs)[0]
    assert seen == [(2, 2, 256), (2, 2, 32)]
    assert torch.allclose(actual, expected, atol=1e-5)
