"""A LoRA on quantized layers adds what it would add to the output of float layers; it can be weighted and unloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import edadm_cli
from edadm_cli.calibrate.nearest import quantize_to_nearest
from edadm_cli.config import BitWidth
from edadm_cli.errors import InputError, UsageError
from edadm_cli.integrations.methods import bind_methods
from edadm_cli.models.example_calls import example_call
from edadm_cli.quant.layers import QuantizedLayer
from edadm_cli.quant.split_layer import SplitLayer
from edadm_cli.recipe import load_recipe
from tests.denoisers.families import FAMILIES
from tests.integration.small_runs import predict

pytest.importorskip("peft")

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
TARGETS = (
    f"{BLOCK}.attn1.to_q",
    f"{BLOCK}.ff.net.2",
    "mid_block.resnets.0.conv1",
    "up_blocks.1.resnets.0.conv_shortcut",
)
RANK = 2


def _shape(layer: nn.Module) -> tuple[int, ...]:
    if isinstance(layer, SplitLayer):
        first = layer.parts[0]
        assert isinstance(first, QuantizedLayer)
        return (first.weight_shape[0], sum(layer.sizes), *first.weight_shape[2:])
    return tuple(layer.weight_shape if isinstance(layer, QuantizedLayer) else layer.weight.shape)


def _factors(denoiser: nn.Module, targets: tuple[str, ...], seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name in targets:
        rows, channels, *kernel = _shape(denoiser.get_submodule(name))
        a = 0.2 * torch.randn(RANK, channels, *kernel, generator=generator)
        factors[name] = (a, torch.randn(rows, RANK, *[1] * len(kernel), generator=generator))
    return factors


def _peft_keys(factors: dict[str, tuple[Tensor, Tensor]], prefix: str) -> dict[str, Tensor]:
    state = {}
    for name, (a, b) in factors.items():
        state[f"{prefix}.{name}.lora_A.weight"], state[f"{prefix}.{name}.lora_B.weight"] = a, b
    return state


def _kohya_keys(factors: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    state = {}
    for name, (a, b) in factors.items():
        stem = f"lora_unet_{name.replace('.', '_')}"
        state[f"{stem}.lora_down.weight"], state[f"{stem}.lora_up.weight"] = a, b
        state[f"{stem}.alpha"] = torch.tensor(float(RANK))
    return state


class SideBranches:
    """What the adapters are to add, by hooks on the layers as they were exported."""

    def __init__(self, denoiser: nn.Module, adapters: list[tuple[dict[str, tuple[Tensor, Tensor]], float]]) -> None:
        self.handles = [
            denoiser.get_submodule(name).register_forward_hook(self._hook(a, b, scale))
            for factors, scale in adapters
            for name, (a, b) in factors.items()
        ]

    @staticmethod
    def _hook(a: Tensor, b: Tensor, scale: float) -> Any:
        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if a.ndim == 2:
                return output + scale * nn.functional.linear(nn.functional.linear(args[0], a), b)
            inner = nn.functional.conv2d(args[0], a, padding=a.shape[-1] // 2)
            return output + scale * nn.functional.conv2d(inner, b)

        return add

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def _expected(denoiser: nn.Module, *adapters: tuple[dict[str, tuple[Tensor, Tensor]], float]) -> Tensor:
    with SideBranches(denoiser, list(adapters)):
        return predict(denoiser)


def test_an_export_is_saved_without_adapters_or_not_at_all(pipeline: Any, tmp_path: Path) -> None:
    before = predict(pipeline.unet)
    pipeline.load_lora_weights(_peft_keys(_factors(pipeline.unet, TARGETS, 1), "unet"), adapter_name="first")
    with pytest.raises(UsageError, match="unload it first"):
        pipeline.save_pretrained(tmp_path / "refused")
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert len(list((tmp_path / "saved" / "unet").glob("*.safetensors"))) > 1  # the argument has arrived
    assert torch.equal(predict(type(pipeline).from_pretrained(tmp_path / "saved").unet), before)


def test_adapters_are_loaded_weighted_exchanged_and_unloaded(pipeline: Any) -> None:
    unet = pipeline.unet
    assert isinstance(unet.get_submodule(TARGETS[-1]), SplitLayer)
    before = predict(unet)
    first, second = _factors(unet, TARGETS, 1), _factors(unet, TARGETS[:2], 2)
    with_first = _expected(unet, (first, 1.0))
    with_both = _expected(unet, (first, 0.5), (second, 0.25))
    assert (with_first - before).norm() > 0.05 * before.norm()

    pipeline.load_lora_weights(_peft_keys(first, "unet"), adapter_name="first")
    torch.testing.assert_close(predict(unet), with_first)
    pipeline.load_lora_weights(_kohya_keys(second), adapter_name="second")
    pipeline.set_adapters(["first", "second"], adapter_weights=[0.5, 0.25])
    torch.testing.assert_close(predict(unet), with_both)
    pipeline.disable_lora()
    assert torch.equal(predict(unet), before)
    pipeline.enable_lora()
    pipeline.delete_adapters("second")
    pipeline.set_adapters("first", 1.0)
    torch.testing.assert_close(predict(unet), with_first)
    pipeline.unload_lora_weights()
    assert torch.equal(predict(unet), before)
    assert isinstance(unet.get_submodule(TARGETS[0]), QuantizedLayer)


def test_a_lora_runs_in_one_compiled_graph(few_blocks: Any) -> None:
    targets = (*TARGETS[:2], "down_blocks.0.resnets.0.conv1", "up_blocks.0.resnets.0.conv_shortcut")
    factors = _factors(few_blocks.unet, targets, 1)
    expected = _expected(few_blocks.unet, (factors, 1.0))
    few_blocks.load_lora_weights(_peft_keys(factors, "unet"))
    torch.compiler.reset()  # torch counts the compilations of other tests too, and refuses after a few
    compiled = torch.compile(few_blocks.unet, fullgraph=True, backend="eager")
    torch.testing.assert_close(predict(compiled), expected)


def test_a_merge_is_refused_and_the_adapter_stays(pipeline: Any) -> None:
    pipeline.load_lora_weights(_peft_keys(_factors(pipeline.unet, TARGETS, 1), "unet"))
    before = predict(pipeline.unet)
    with pytest.raises(UsageError, match="cannot be merged"):
        pipeline.fuse_lora()
    assert torch.equal(predict(pipeline.unet), before)


@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_transformers_take_a_lora(kind: str) -> None:
    torch.manual_seed(0)
    denoiser = FAMILIES[kind]().eval()
    args, kwargs = example_call(denoiser, batch_size=2)
    quantize_to_nearest(denoiser, load_recipe("rtn"), BitWidth.parse("w8a8"), [(args, kwargs)])
    bind_methods(denoiser)
    targets = ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.ff.net.0.proj")
    factors = _factors(denoiser, targets, 3)

    def run() -> Tensor:
        with torch.no_grad():
            output: Tensor = denoiser(*args, **kwargs)[0]
        return output

    with SideBranches(denoiser, [(factors, 1.0)]):
        expected = run()
    denoiser.load_lora_adapter(_peft_keys(factors, "transformer"), prefix="transformer")
    torch.testing.assert_close(run(), expected)


def test_an_engine_takes_adapters_and_pipelines_weight_them(exported_sd: Path, tmp_path: Path, pipeline: Any) -> None:
    factors = _factors(pipeline.unet, TARGETS[:2], 1)
    file = tmp_path / "style.v1.safetensors"
    save_file(_peft_keys(factors, "unet"), file)
    loaded: Any = edadm_cli.load(exported_sd, engine="cuda", device="cpu", lora={file: 0.5})
    call = example_call(pipeline.unet, batch_size=1)
    predictions = []
    for weight in (0.5, 4.0, 0.0):
        if weight != 0.5:
            loaded.set_adapters("style_v1", weight)
        with torch.no_grad(), SideBranches(pipeline.unet, [(factors, weight)]):
            expected = pipeline.unet(*call[0], **call[1])[0]
        predictions.append(loaded.unet(*call[0], **call[1])[0])
        assert (predictions[-1] - expected).norm() < 0.1 * expected.norm()
    assert (predictions[1] - predictions[2]).norm() > 0.3 * predictions[2].norm()
    with pytest.raises(UsageError, match="would change nothing"):
        loaded.load_lora_weights(_peft_keys(factors, "unet"))
    with pytest.raises(UsageError, match="runs no LoRA"):
        edadm_cli.load(exported_sd, engine="openvino", device="cpu", lora={file: 0.5})


def test_files_of_other_models_and_damaged_ones_are_refused(exported_sd: Path, tmp_path: Path, pipeline: Any) -> None:
    tensors = _peft_keys(_factors(pipeline.unet, TARGETS[:1], 1), "unet")
    (name, value), *_ = tensors.items()
    files = {
        "another model": {key.replace("unet", "transformer"): tensor for key, tensor in tensors.items()},
        "is not a LoRA of": {key: tensor[..., :3].contiguous() for key, tensor in tensors.items()},
        "not finite": {**tensors, name: value / 0},
    }
    for number, (sentence, content) in enumerate(files.items()):
        file = tmp_path / f"{number}.safetensors"
        save_file(content, file)
        with pytest.raises(InputError, match=sentence):
            edadm_cli.load(exported_sd, engine="torch", device="cpu", lora={file: 1.0})
    (tmp_path / "0.bin").touch()
    for odd, sentence in (("0.bin", "can run code"), ("nowhere.safetensors", "no LoRA file")):
        with pytest.raises(InputError, match=sentence):
            edadm_cli.load(exported_sd, engine="torch", device="cpu", lora={tmp_path / odd: 1.0})
