"""Text encoders with 8-bit weights: what is rounded, what is saved, and what is loaded back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn

from edadm_cli.errors import MachineError, UsageError
from edadm_cli.export import text_encoders
from edadm_cli.export.text_encoders import narrow_saved, quantize_text_encoders, recorded_calls

WIDTH: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {**WIDTH, "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2}
GROUPED: dict[str, Any] = {**HEADS, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
T5: dict[str, Any] = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}


def _clip() -> nn.Module:
    config = transformers.CLIPTextConfig(**HEADS, max_position_embeddings=16, projection_dim=16)
    return transformers.CLIPTextModelWithProjection(config)


def _t5() -> nn.Module:
    return transformers.T5EncoderModel(transformers.T5Config(**T5, feed_forward_proj="gated-gelu"))


def _gemma() -> nn.Module:
    return transformers.Gemma2Model(transformers.Gemma2Config(**GROUPED))


def _qwen_vl() -> nn.Module:
    text = {**GROUPED, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config={**vision, "patch_size": 4})
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


class _Pipeline:
    """A pipeline with one text encoder."""

    def __init__(self, encoder: nn.Module) -> None:
        self.components: dict[str, Any] = {"text_encoder": encoder, "unet": nn.Linear(1, 1)}

    def register_modules(self, **modules: Any) -> None:
        self.components |= modules


def _model(encoder: nn.Module) -> Any:
    return SimpleNamespace(pipeline=_Pipeline(encoder.eval().requires_grad_(False)))


@pytest.mark.parametrize("make", [_clip, _t5, _gemma, _qwen_vl])
def test_linear_layers_are_rounded_to_nearest_and_nothing_else_changes(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    encoder: Any = make().half().float()
    model = _model(encoder)
    tokens = torch.arange(5, 15)[None]
    with recorded_calls(model) as calls, torch.no_grad():
        encoder(tokens, output_hidden_states=True)
    outcome = quantize_text_encoders(model, calls)["text_encoder"]
    quantized = model.pipeline.components["text_encoder"]
    before, rounded = dict(encoder.named_parameters()), 0
    for name, parameter in quantized.named_parameters():
        if type(parameter).__name__ == "Int8Tensor":
            assert isinstance(quantized.get_submodule(name.rpartition(".")[0]), nn.Linear)
            error = (parameter.dequantize() - before[name]).abs()
            assert bool((error <= 0.5001 * before[name].abs().amax(dim=1, keepdim=True) / 127).all())
            rounded += 1
        else:
            assert torch.equal(parameter, before[name])
    assert rounded == outcome.layers >= 12
    assert outcome.cosine is not None
    assert 0.999 < outcome.cosine <= 1.0
    assert outcome.rel_l2 is not None
    assert 0 < outcome.rel_l2 < 0.03

    quantized.save_pretrained(tmp_path)
    narrow_saved(tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.suffix not in (".json", ".safetensors")]
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        kinds = {file.get_tensor(name).dtype for name in file.keys() if "embed" in name or "norm" in name}  # noqa: SIM118
    assert kinds == {torch.float16}  # which holds every value of this encoder exactly
    again: Any = type(encoder).from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        states = [part(tokens, output_hidden_states=True).hidden_states[-1] for part in (quantized, again)]
    assert torch.equal(*states)


def test_a_pipeline_without_text_encoders_and_a_machine_without_torchao_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(text_encoders, "find_spec", lambda name: object())
    with pytest.raises(UsageError, match="has no text encoder"):
        quantize_text_encoders(_model(nn.Linear(1, 1)), {})
    monkeypatch.setattr(text_encoders, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match="needs the package 'torchao'"):
        quantize_text_encoders(_model(nn.Linear(1, 1)), {})
