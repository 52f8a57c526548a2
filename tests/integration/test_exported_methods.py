"""An exported denoiser among other libraries: moved, cast, offloaded, compiled, copied; a LoRA, fused projections."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor
from torch._inductor import config as inductor

from edadm_cli.artifacts import ModelRef
from edadm_cli.errors import UsageError
from edadm_cli.integrations.methods import bind_methods
from edadm_cli.models.example_calls import example_call
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.models.loading import load_model
from edadm_cli.models.random_models import build_random_pipeline
from edadm_cli.models.registry import known_models
from edadm_cli.quant.layers import quantized_layers
from tests.integration.small_runs import CPU, export, predict
from tests.unit.models.tiny import shrunk

TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def generate(pipeline: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        images: Tensor = pipeline("seven", num_inference_steps=2, generator=generator, output_type="pt").images
    return images


CASTS: dict[str, tuple[Callable[[Any], object], torch.dtype]] = {
    "pipeline": (lambda p: p.to(torch.bfloat16), torch.bfloat16),
    "pipeline, with a device": (lambda p: p.to("cpu", torch.float16), torch.float16),
    "denoiser": (lambda p: p.unet.to(torch.bfloat16), torch.bfloat16),
    "denoiser, by name": (lambda p: p.unet.to(device="cpu", dtype=torch.float16), torch.float16),
    "denoiser, like a tensor": (lambda p: p.unet.to(torch.zeros(1, dtype=torch.bfloat16)), torch.bfloat16),
    "half": (lambda p: p.unet.half(), torch.float16),
    "there and back": (lambda p: p.unet.half().float(), torch.float32),
}


@pytest.mark.parametrize(("cast", "dtype"), CASTS.values(), ids=CASTS.keys())
def test_a_cast_spares_codes_and_scales(
    exported_sd: Path, pipeline: Any, cast: Callable[[Any], object], dtype: torch.dtype
) -> None:
    before = {name: buffer.clone() for name, buffer in pipeline.unet.named_buffers()}
    cast(pipeline)
    after = dict(pipeline.unet.named_buffers())
    assert {buffer.dtype for buffer in before.values()} == {torch.float32, torch.int32, torch.uint8, torch.int8}
    assert all(
        after[name].dtype == buffer.dtype and torch.equal(after[name], buffer) for name, buffer in before.items()
    )
    assert {parameter.dtype for parameter in pipeline.unet.parameters()} == {dtype}
    if dtype != torch.float32:
        loaded = DiffusionPipeline.from_pretrained(exported_sd, dtype=dtype).unet
        assert torch.equal(predict(pipeline.unet, dtype), predict(loaded, dtype)), "as if it had been loaded so"


def test_a_copy_is_cast_by_itself_and_saved(exported_sd: Path, pipeline: Any, tmp_path: Path) -> None:
    copied = copy.deepcopy(pipeline.unet)
    copied.half()
    assert {parameter.dtype for parameter in pipeline.unet.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in copied.parameters()} == {torch.float16}
    copied.save_pretrained(tmp_path / "copy")
    again = UNet2DConditionModel.from_pretrained(tmp_path / "copy", dtype=torch.float16)
    assert torch.equal(predict(again, torch.float16), predict(copied, torch.float16))


def test_a_denoiser_is_moved_away(pipeline: Any) -> None:
    predict(pipeline.unet)
    away = copy.deepcopy(pipeline.unet).to("meta", torch.float16)
    assert {tensor.device.type for tensor in (*away.parameters(), *away.buffers())} == {"meta"}
    assert {buffer.dtype for name, buffer in away.named_buffers() if name.endswith("_scale")} == {torch.float32}


@pytest.mark.parametrize(
    "kind", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}]
)
def test_a_denoiser_is_offloaded_in_groups(pipeline: Any, kind: dict[str, Any]) -> None:
    expected = predict(pipeline.unet)
    pipeline.unet.enable_group_offload(onload_device=CPU, offload_device=CPU, **kind)
    assert torch.equal(predict(pipeline.unet), expected)


@pytest.mark.parametrize("offload_buffers", [False, True])
def test_a_denoiser_is_offloaded_tensor_by_tensor(pipeline: Any, offload_buffers: bool) -> None:
    """What `enable_sequential_cpu_offload` does; codes and scales are buffers."""
    expected = predict(pipeline.unet)
    accelerate.cpu_offload(pipeline.unet, execution_device=CPU, offload_buffers=offload_buffers)
    for _ in range(2):
        assert {parameter.device.type for parameter in pipeline.unet.parameters()} == {"meta"}
        if offload_buffers:
            assert {buffer.device.type for buffer in pipeline.unet.buffers()} == {"meta"}
        assert torch.equal(predict(pipeline.unet), expected)
    layers = quantized_layers(pipeline.unet).values()
    assert all(layer._weight is None for layer in layers), "a float copy of the weight would stay where it was used"
    accelerate.hooks.remove_hook_from_submodules(pipeline.unet)
    assert torch.equal(predict(pipeline.unet), expected)


def test_a_whole_pipeline_is_offloaded_with_its_buffers(pipeline: Any) -> None:
    expected = generate(pipeline)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        accelerate.cpu_offload(part, execution_device=CPU, offload_buffers=True)
    assert torch.equal(generate(pipeline), expected)


def test_a_fusion_of_projections_is_refused_and_changes_nothing(pipeline: Any) -> None:
    """A fused layer would be made of float weights, and its processor would take the place of quantized products."""
    before, processors = predict(pipeline.unet), dict(pipeline.unet.attn_processors)
    for attempt in (pipeline.fuse_qkv_projections, pipeline.unet.fuse_qkv_projections):
        with pytest.raises(
            UsageError, match=r"^The projections of this UNet2DConditionModel are quantized, .*"
        ) as caught:
            attempt()
        assert "\n" not in str(caught.value)
    pipeline.unfuse_qkv_projections(vae=False)
    pipeline.unet.unfuse_qkv_projections()
    assert pipeline.unet.attn_processors == processors
    assert torch.equal(predict(pipeline.unet), before)
    pipeline.fuse_qkv_projections(unet=False)  # what the sentence says
    pipeline.unfuse_qkv_projections(unet=False)


def test_another_processor_is_refused_where_attention_is_quantized(pipeline: Any) -> None:
    before, processors = predict(pipeline.unet), dict(pipeline.unet.attn_processors)
    attempts: list[Callable[[], Any]] = [
        pipeline.enable_attention_slicing,
        lambda: pipeline.enable_attention_slicing("max"),
        lambda: pipeline.unet.set_attn_processor(AttnProcessor2_0()),
        lambda: pipeline.unet.set_attn_processor(dict.fromkeys(processors, AttnProcessor())),
    ]
    for attempt in attempts:
        with pytest.raises(UsageError, match=r"^Attention is quantized here") as caught:
            attempt()
        assert "\n" not in str(caught.value)
    pipeline.disable_attention_slicing()
    pipeline.unet.set_attn_processor(dict(processors))
    assert pipeline.unet.attn_processors == processors
    assert torch.equal(predict(pipeline.unet), before)


def test_another_processor_is_taken_where_attention_is_not(tiny_sd: Path) -> None:
    unet = load_model(str(tiny_sd), CPU, torch.float32).denoiser
    expected = predict(unet)
    bind_methods(unet)
    unet.set_attention_slice("max")  # type: ignore[operator]
    torch.testing.assert_close(predict(unet), expected)
    unet.set_attn_processor(AttnProcessor())  # type: ignore[operator]
    torch.testing.assert_close(predict(unet), expected)


def test_projections_that_are_not_quantized_are_fused(tiny_sd: Path) -> None:
    unet = load_model(str(tiny_sd), CPU, torch.float32).denoiser
    expected = predict(unet)
    bind_methods(unet)
    unet.fuse_qkv_projections()  # type: ignore[operator]
    torch.testing.assert_close(predict(unet), expected)
    unet.unfuse_qkv_projections()  # type: ignore[operator]
    torch.testing.assert_close(predict(unet), expected)


def test_a_denoiser_is_one_graph_for_torch_compile(few_blocks: Any) -> None:
    """Nothing in a quantized denoiser breaks the graph, and the graph computes the same bytes."""
    torch._dynamo.reset()
    compiled = torch.compile(few_blocks.unet, backend="eager", fullgraph=True)
    assert torch.equal(predict(compiled), predict(few_blocks.unet))  # type: ignore[arg-type]


def test_a_compiled_denoiser_computes_what_the_eager_one_does(tmp_path: Path) -> None:
    """Inductor sums in another order, so the last bits differ and a value between two codes may get the other code.

    Few values do: the bound of the whole error is one step of the 8-bit grid, 1 / 255 of the range.
    """
    architecture = shrunk("dit-xl-2")
    cls, config = architecture.components["transformer"]
    components = {**architecture.components, "transformer": (cls, {**config, "num_layers": 1})}
    pipeline = build_random_pipeline(architecture.model_copy(update={"components": components}), 0, torch.float32)
    ref, entry = ModelRef(id="dit", revision=None, fingerprint="0" * 64), known_models()["dit-xl-2-random"]
    folder = export(LoadedModel(ref, entry, pipeline, "transformer", None), tmp_path / "pipeline")
    transformer = DiffusionPipeline.from_pretrained(folder).transformer
    args, kwargs = example_call(transformer, batch_size=2)
    torch._dynamo.reset()
    with torch.no_grad(), inductor.patch(compile_threads=1):  # else processes are started that import torch
        eager = transformer(*args, **kwargs).sample
        compiled = torch.compile(transformer, fullgraph=True)(*args, **kwargs).sample
    assert float((compiled - eager).norm() / eager.norm()) < 1 / 255


def test_a_pickled_denoiser_is_read_again(pipeline: Any) -> None:
    """It is pickled, as for a spawned process, and still casts and refuses as before."""
    call = example_call(pipeline.unet, batch_size=1)
    file = io.BytesIO()
    torch.save(pipeline.unet, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    with torch.no_grad():
        assert torch.equal(again(*call[0], **call[1]).sample, pipeline.unet(*call[0], **call[1]).sample)
    assert again.half().conv_in.weight_scale.dtype == torch.float32
    assert next(pipeline.unet.parameters()).dtype == torch.float32, "a method acts on its own module"
    with pytest.raises(UsageError, match="cannot be fused"):
        again.fuse_qkv_projections()
