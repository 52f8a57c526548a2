"""Single-file Stable Diffusion checkpoints load offline and compute what they hold."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from edadm_cli.artifacts import RunFolder
from edadm_cli.collect import stage as collect
from edadm_cli.config import CollectConfig
from edadm_cli.errors import EXIT_INPUT, InputError
from edadm_cli.models.architecture import Architecture, load_architecture
from edadm_cli.models.checkpoints import opening
from edadm_cli.models.checkpoints.accounting import autoencoder_places, denoiser_places, empty_module
from edadm_cli.models.collected import CollectedRun
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.models.loading import load_model
from edadm_cli.models.pipeline_calls.sampling import sample
from edadm_cli.models.random_models import build_random_pipeline
from edadm_cli.models.registry import known_models
from tests.denoisers.unets import xl_refiner
from tests.unit.models.compvis import State, autoencoder_state, open_clip_state, unet_state, with_schedule
from tests.unit.models.original_names import flux_state, sd3_state
from tests.unit.models.tiny import shrunk

CPU = torch.device("cpu")


@pytest.fixture
def small_sd15(monkeypatch: pytest.MonkeyPatch) -> Architecture:
    """The architecture of sd15 with a fraction of its channels; the text encoder keeps the vocabulary."""
    components = dict(load_architecture("sd15").components)
    changes: dict[str, dict[str, Any]] = {
        "unet": {"block_out_channels": [32, 64], "sample_size": 8, "cross_attention_dim": 32, "layers_per_block": 1}
        | {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"]}
        | {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]},
        "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        "vae": {"block_out_channels": [32, 64], "layers_per_block": 1, "sample_size": 16}
        | {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2},
    }
    for name, change in changes.items():
        components[name] = (components[name][0], {**components[name][1], **change})
    small = load_architecture("sd15").model_copy(update={"components": components})
    monkeypatch.setattr(opening, "load_architecture", lambda name: {"sd15": small}[name])
    return small


def state_of(pipeline: Any) -> State:
    state = with_schedule(unet_state(pipeline.unet) | autoencoder_state(pipeline.vae))
    for name, tensor in pipeline.text_encoder.state_dict().items():
        old = name if name.startswith("text_model.") else f"text_model.{name}"
        state[f"cond_stage_model.transformer.{old}"] = tensor.clone()
    positions = torch.arange(77)[None]
    return {**state, "cond_stage_model.transformer.text_model.embeddings.position_ids": positions}


def write(path: Path, state: State) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save({"state_dict": state}, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_single_file_gives_the_images_of_its_weights(tmp_path: Path, small_sd15: Architecture, suffix: str) -> None:
    pipeline = build_random_pipeline(small_sd15, 0, torch.float32)
    path = write(tmp_path / f"model{suffix}", state_of(pipeline))
    model = load_model(str(path), CPU, torch.float32)
    for name in ("unet", "vae", "text_encoder"):
        loaded, original = model.pipeline.components[name].state_dict(), pipeline.components[name].state_dict()
        assert loaded.keys() == original.keys()
        assert all(torch.equal(loaded[key], tensor) for key, tensor in original.items())
    assert type(model.pipeline.scheduler).__name__ == "PNDMScheduler"
    assert model.pipeline.tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert model.entry.source == "file"
    assert model.entry.guidance_scale == 7.5
    images = sample(model, seeds=[3], prompts=["a cat"], num_steps=2, guidance_scale=2.0).images
    assert images.shape == (1, 3, 16, 16)


def small_of(name: str) -> Architecture:
    components = dict(shrunk(name).components)
    if name == "sdxl":  # two text encoders are distinguished by their widths
        for part, change in {
            "text_encoder_2": {"hidden_size": 64},
            "unet": {"cross_attention_dim": 96},
        }.items():
            components[part] = (components[part][0], {**components[part][1], **change})
    return shrunk(name).model_copy(update={"components": components})


def xl_state(pipeline: Any) -> State:
    state = with_schedule(unet_state(pipeline.unet) | autoencoder_state(pipeline.vae))
    state |= open_clip_state(pipeline.text_encoder_2, "conditioner.embedders.1.model.")
    for key, tensor in pipeline.text_encoder.state_dict().items():
        state[f"conditioner.embedders.0.transformer.text_model.{key.removeprefix('text_model.')}"] = tensor.clone()
    return state


@pytest.mark.parametrize("name", ["sd21", "sdxl"])
def test_newer_versions_load_with_their_text_encoders(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = small_of(name)
    monkeypatch.setattr(opening, "load_architecture", lambda known: {name: small}[known])
    pipeline = build_random_pipeline(small, 0, torch.float32)
    if name == "sd21":
        state = with_schedule(unet_state(pipeline.unet) | autoencoder_state(pipeline.vae))
        state |= open_clip_state(pipeline.text_encoder, "cond_stage_model.model.")
    else:
        state = xl_state(pipeline)
    model = load_model(str(write(tmp_path / "model.safetensors", state)), CPU, torch.float32)
    assert model.entry.num_steps == known_models()[name].num_steps
    for part, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            loaded, original = model.pipeline.components[part].state_dict(), component.state_dict()
            assert loaded.keys() == original.keys()
            assert all(torch.equal(loaded[key], tensor) for key, tensor in original.items()), part
    images = sample(model, seeds=[3], prompts=["a cat"], num_steps=2, guidance_scale=5.0).images
    assert images.shape == (1, 3, 16, 16)
    if name == "sdxl":  # its inpainting version has nine channels
        first = "model.diffusion_model.input_blocks.0.0.weight"
        state[first] = torch.randn(state[first].shape[0], 9, 3, 3)
        inpainting = load(tmp_path / "inpainting.safetensors", state)
        assert type(inpainting.pipeline).__name__ == "StableDiffusionXLInpaintPipeline"
        assert torch.equal(inpainting.denoiser.conv_in.weight, state[first])


# Tensors of the published checkpoints, of the denoiser and of the autoencoder.
NUM_TENSORS = {"sd15": (686, 248), "sd21": (686, 248), "sdxl": (1680, 248)}


@pytest.mark.parametrize("name", sorted(NUM_TENSORS))
def test_full_size_names_are_as_many_as_in_the_published_checkpoints(name: str) -> None:
    architecture = load_architecture(name)
    actual = []
    for part, places in (("unet", denoiser_places), ("vae", autoencoder_places)):
        module = empty_module(architecture, part)
        place = places(module)
        actual.append(len({place(key).key for key, _ in module.named_parameters()}))
    assert tuple(actual) == NUM_TENSORS[name]


@pytest.mark.parametrize(
    "key",
    [
        "model.diffusion_model.middle_block.0.in_layers.2.weight",
        "first_stage_model.decoder.conv_in.weight",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
    ],
)
def test_a_missing_tensor_is_named(tmp_path: Path, small_sd15: Architecture, key: str) -> None:
    state = state_of(build_random_pipeline(small_sd15, 0, torch.float32))
    del state[key]
    with pytest.raises(InputError) as caught:
        load_model(str(write(tmp_path / "model.safetensors", state)), CPU, torch.float32)
    assert key.rsplit(".", 2)[1] in caught.value.message


def test_a_tensor_too_many_is_named(tmp_path: Path, small_sd15: Architecture) -> None:
    state = state_of(build_random_pipeline(small_sd15, 0, torch.float32))
    state["model.diffusion_model.input_blocks.9.0.extra.weight"] = torch.zeros(1)
    with pytest.raises(InputError, match=r"does not take: .*extra"):
        load_model(str(write(tmp_path / "model.safetensors", state)), CPU, torch.float32)


def test_every_bit_of_the_content_counts_in_the_fingerprint(tmp_path: Path, small_sd15: Architecture) -> None:
    state = state_of(build_random_pipeline(small_sd15, 0, torch.float32))
    first = load_model(str(write(tmp_path / "a.safetensors", state)), CPU, torch.float32).ref
    again = load_model(str(write(tmp_path / "b.safetensors", state)), CPU, torch.float32).ref
    state["model.diffusion_model.out.2.bias"][0] += 1
    other = load_model(str(write(tmp_path / "c.safetensors", state)), CPU, torch.float32).ref
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.id == str(tmp_path / "a.safetensors")


def load(path: Path, state: State, **options: Any) -> LoadedModel:
    return load_model(str(write(path, state)), CPU, torch.float32, **options)


def refusal(path: Path, state: State) -> str:
    with pytest.raises(InputError) as caught:
        load(path, state)
    assert caught.value.exit_code == EXIT_INPUT
    return f"{caught.value.message} {caught.value.hint}"


def test_marker_tensors_decide_the_prediction_type_and_the_noise_schedule(
    tmp_path: Path, small_sd15: Architecture
) -> None:
    state = state_of(build_random_pipeline(small_sd15, 0, torch.float32))
    plain = load(tmp_path / "plain.safetensors", state)
    assert plain.pipeline.scheduler.config.prediction_type == "epsilon"
    marked = load(tmp_path / "v.safetensors", {**state, "v_pred": torch.zeros(0)})
    assert marked.pipeline.scheduler.config.prediction_type == "v_prediction"
    zero = load(tmp_path / "zero.safetensors", {**state, "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)})
    scheduler = zero.pipeline.scheduler
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.timestep_spacing == "trailing"
    assert float(scheduler.alphas_cumprod[-1]) < 1e-6
    assert "EDM" in refusal(tmp_path / "edm.safetensors", {**state, "edm_vpred.sigma_max": torch.ones(())})
    assert len({plain.ref.fingerprint, marked.ref.fingerprint, zero.ref.fingerprint}) == 3


def test_the_prediction_type_of_stable_diffusion_2_is_said_or_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = small_of("sd21")
    monkeypatch.setattr(opening, "load_architecture", lambda known: {"sd21": small}[known])
    pipeline = build_random_pipeline(small, 0, torch.float32)
    state = with_schedule(unet_state(pipeline.unet) | autoencoder_state(pipeline.vae))
    state |= open_clip_state(pipeline.text_encoder, "cond_stage_model.model.")
    path = write(tmp_path / "model.safetensors", state)
    run = RunFolder(tmp_path / "run")
    config = CollectConfig(model=str(path), num_trajectories=1, num_steps=2, device="cpu")
    assert any("--prediction-type epsilon" in warning for warning in collect.run(config, run).warnings)
    assert CollectedRun.open(run).load(CPU, torch.float32).pipeline.scheduler.config.prediction_type == "v_prediction"
    other = RunFolder(tmp_path / "other")
    record = collect.run(config.model_copy(update={"prediction_type": "epsilon"}), other)
    assert record.warnings == ()
    assert CollectedRun.open(other).load(CPU, torch.float32).pipeline.scheduler.config.prediction_type == "epsilon"
    assert record.identity != run.open("collect").identity


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
def test_narrow_checkpoints_load(tmp_path: Path, small_sd15: Architecture, dtype: torch.dtype) -> None:
    state = state_of(build_random_pipeline(small_sd15, 0, torch.float32))
    narrow = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
    model = load(tmp_path / "model.safetensors", narrow)
    expected = narrow["model.diffusion_model.out.2.weight"].float()
    assert torch.equal(model.denoiser.conv_out.weight, expected)
    name = "model.diffusion_model.out.2.weight"
    narrow[name] = torch.full_like(expected, float("nan")).to(dtype)
    assert "not finite" in refusal(tmp_path / "nan.safetensors", narrow)


def test_a_file_is_read_under_the_name_that_it_is_given_by(tmp_path: Path, small_sd15: Architecture) -> None:
    state = state_of(build_random_pipeline(small_sd15, 0, torch.float32))
    snapshot = tmp_path / "snapshots/abc"
    snapshot.mkdir(parents=True)
    blob = write(tmp_path / "blob.safetensors", state).rename(tmp_path / "6ce0161689b3")
    (snapshot / "model.SAFETENSORS").symlink_to("../../6ce0161689b3")
    model = load_model(str(snapshot / "model.SAFETENSORS"), CPU, torch.float32)
    assert model.ref.id == str(snapshot / "model.SAFETENSORS")
    assert torch.equal(model.denoiser.conv_out.weight, state["model.diffusion_model.out.2.weight"])
    assert blob.is_file()


@pytest.mark.parametrize("name", ["lora_unet_down.weight", "control_model.zero.weight", "embedding_manager.a.weight"])
def test_tensors_that_change_a_model_are_refused_and_others_are_reported(
    tmp_path: Path, small_sd15: Architecture, name: str
) -> None:
    state = state_of(build_random_pipeline(small_sd15, 0, torch.float32))
    assert name in refusal(tmp_path / "model.safetensors", {**state, name: torch.zeros(1)})
    extra = {"model_ema.decay": torch.zeros(()), "training.step.count": torch.zeros(1)}
    remarks = load(tmp_path / "trained.safetensors", {**state, **extra}).remarks
    assert len(remarks) == 1
    assert "'training.step.count'" in remarks[0]


def test_inpainting_and_editing_versions_load_as_their_pipelines(tmp_path: Path, small_sd15: Architecture) -> None:
    state = state_of(build_random_pipeline(small_sd15, 0, torch.float32))
    first = "model.diffusion_model.input_blocks.0.0.weight"
    kinds = {9: "StableDiffusionInpaintPipeline", 8: "StableDiffusionInstructPix2PixPipeline"}
    for channels, pipeline in kinds.items():
        weight = torch.randn(state[first].shape[0], channels, 3, 3)
        model = load(tmp_path / f"{channels}.safetensors", {**state, first: weight})
        assert type(model.pipeline).__name__ == pipeline
        assert torch.equal(model.denoiser.conv_in.weight, weight)
    assert "5 input channels" in refusal(tmp_path / "5.safetensors", {**state, first: torch.zeros(32, 5, 3, 3)})


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["lora_unet_down_blocks_0.lora_down.weight"], "is a LoRA"),
        (["unet.down_blocks.0.attn.lora_A.weight"], "is a LoRA"),
        (["control_model.input_blocks.0.0.weight"], "is a ControlNet"),
        (["model.diffusion_model.double_blocks.0.img_attn.qkv.weight"], "the transformer of a Flux"),
        (["double_blocks.0.img_attn.qkv.weight"], "the transformer of a Flux"),
        (["model.diffusion_model.joint_blocks.0.x.weight"], "Stable Diffusion 3"),
        (["conditioner.embedders.0.model.ln.weight", "model.diffusion_model.input_blocks.0.0.weight"], "XL refiner"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "holds a denoiser"),
        (["input_blocks.0.0.weight"], "holds a denoiser"),
        (["conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"], "holds a denoiser"),
        (["encoder.conv_in.weight", "decoder.conv_in.weight"], "is an autoencoder"),
        (["something.else"], "first tensor is 'something.else'"),
    ],
)
def test_a_file_that_is_no_pipeline_is_called_what_it_is(tmp_path: Path, names: list[str], said: str) -> None:
    assert said in refusal(tmp_path / "model.safetensors", {name: torch.zeros(4, 4, 3, 3) for name in names})


def test_a_file_without_an_autoencoder_is_said_to_have_none(tmp_path: Path, small_sd15: Architecture) -> None:
    state = state_of(build_random_pipeline(small_sd15, 0, torch.float32))
    without = {name: tensor for name, tensor in state.items() if not name.startswith("first_stage_model.")}
    assert "without an autoencoder (VAE)" in refusal(tmp_path / "model.safetensors", without)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_a_denoiser_alone_is_completed_by_the_folder_beside_it(
    tmp_path: Path, tiny_sd: Path, prefix: str, dtype: torch.dtype
) -> None:
    whole = load_model(str(tiny_sd), CPU, torch.float32)
    folder = Path(shutil.copytree(tiny_sd, tmp_path / "mine"))
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    names = {name: name.replace("model.diffusion_model.", prefix) for name in unet_state(whole.denoiser)}
    state = {names[name]: tensor.to(dtype) for name, tensor in unet_state(whole.denoiser).items()}
    path = tmp_path / "mine.safetensors"
    model = load(path, state)
    for name, tensor in whole.denoiser.state_dict().items():
        assert torch.equal(model.denoiser.state_dict()[name], tensor.to(dtype).float()), name
    assert model.ref.id == str(path)
    images = sample(model, seeds=[3], prompts=["one"], num_steps=2, guidance_scale=2.0).images
    if dtype == torch.float32:
        assert torch.equal(images, sample(whole, seeds=[3], prompts=["one"], num_steps=2, guidance_scale=2.0).images)
    scheduler = folder / "scheduler/scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("0.012", "0.013"))
    assert load_model(str(path), CPU, torch.float32).ref.fingerprint != model.ref.fingerprint
    del state[names["model.diffusion_model.out.2.bias"]]
    assert "mine.safetensors" in refusal(path, state)


def test_a_transformer_under_the_names_of_diffusers_is_completed_by_its_folder(tmp_path: Path) -> None:
    pipeline = build_random_pipeline(shrunk("sd3.5-medium"), 0, torch.float32)
    pipeline.save_pretrained(tmp_path / "mine")
    weights = tmp_path / "mine/transformer/diffusion_pytorch_model.safetensors"
    weights.rename(tmp_path / "mine.safetensors")
    model = load_model(str(tmp_path / "mine.safetensors"), CPU, torch.float32)
    assert type(model.pipeline).__name__ == "StableDiffusion3Pipeline"
    for name, tensor in pipeline.transformer.state_dict().items():
        assert torch.equal(model.denoiser.state_dict()[name], tensor), name
    edit = tmp_path / "mine/transformer/config.json"
    edit.write_text(edit.read_text().replace('"num_layers": 3', '"num_layers": 4'))
    with pytest.raises(InputError, match=r"mine\.safetensors"):
        load_model(str(tmp_path / "mine.safetensors"), CPU, torch.float32)


@pytest.fixture(scope="module")
def sd35(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder without the weights of its denoiser, and these weights."""
    folder = tmp_path_factory.mktemp("sd35") / "mine"
    pipeline = build_random_pipeline(shrunk("sd3.5-medium"), 0, torch.float32)
    pipeline.save_pretrained(folder)
    (folder / "transformer/diffusion_pytorch_model.safetensors").unlink()
    return folder, dict(pipeline.transformer.state_dict())


@pytest.mark.parametrize("scale_name", ["scale_weight", "weight_scale"])
def test_scaled_weights_of_float8_are_multiplied_by_their_scales(
    sd35: tuple[Path, dict[str, torch.Tensor]], scale_name: str
) -> None:
    folder, weights = sd35
    state = dict(weights)
    for name in [name for name, tensor in weights.items() if name.endswith("ff.net.2.weight")]:
        scale = weights[name].abs().max() / 448
        state[name] = (weights[name] / scale).to(torch.float8_e4m3fn)
        state[f"{name.removesuffix('weight')}{scale_name}"] = scale
        state[f"{name.removesuffix('weight')}scale_input"] = torch.ones(())
    if scale_name == "scale_weight":
        state["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    model = load(folder.with_suffix(".safetensors"), state)
    assert model.remarks == ()
    loaded = model.denoiser.state_dict()
    for name, tensor in weights.items():
        assert float((loaded[name] - tensor).abs().max()) <= (float(tensor.abs().max()) / 16 if name in state else 0)
    name = next(name for name in state if name.endswith(scale_name))
    for broken in (torch.ones(7), torch.tensor(float("nan"))):
        assert "must hold one finite number" in refusal(folder.with_suffix(".safetensors"), {**state, name: broken})


def test_scaled_weights_in_a_whole_pipeline_are_refused(tmp_path: Path, small_sd15: Architecture) -> None:
    state = state_of(build_random_pipeline(small_sd15, 0, torch.float32)) | {"scaled_fp8": torch.empty(2)}
    assert "only from a file that holds a denoiser alone" in refusal(tmp_path / "model.safetensors", state)


def test_tensors_that_a_denoiser_does_not_have_are_reported_or_refused(
    sd35: tuple[Path, dict[str, torch.Tensor]],
) -> None:
    folder, weights = sd35
    path = folder.with_suffix(".safetensors")
    (remark,) = load(path, {**weights, "trainer.step": torch.ones(1), "trainer.epoch": torch.ones(1)}).remarks
    assert "2 tensors that the denoiser does not have" in remark
    assert "trainer." in remark
    words = refusal(path, {**weights, "transformer_blocks.0.ff.net.2.weight.absmax": torch.ones(2)})
    assert "weight.absmax', which changes the denoiser" in words


def test_a_lora_beside_a_folder_stays_a_lora(tmp_path: Path, tiny_sd: Path) -> None:
    shutil.copytree(tiny_sd, tmp_path / "mine")
    assert "is a LoRA" in refusal(tmp_path / "mine.safetensors", {"lora_unet_a.lora_down.weight": torch.zeros(1)})


def test_files_of_full_size_flux_have_the_names_and_shapes_that_diffusers_converts() -> None:
    """diffusers splits the layers of FLUX at its full width, 3,072, so no small file of it can be loaded."""
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    transformer = empty_module(load_architecture("flux-dev"), "transformer")
    converted = convert_flux_transformer_checkpoint_to_diffusers(flux_state(transformer))
    expected = {name: tensor.shape for name, tensor in transformer.state_dict().items()}
    assert {name: tensor.shape for name, tensor in converted.items()} == expected


def test_a_file_of_stable_diffusion_35_is_completed_by_the_folder_beside_it(tmp_path: Path) -> None:
    pipeline = build_random_pipeline(shrunk("sd3.5-medium"), 0, torch.float32)
    pipeline.save_pretrained(tmp_path / "mine")
    (tmp_path / "mine/transformer/diffusion_pytorch_model.safetensors").unlink()
    prefix, dtype = "model.diffusion_model.", torch.float8_e4m3fn
    state = {prefix + key: tensor.to(dtype) for key, tensor in sd3_state(pipeline.transformer).items()}
    model = load(tmp_path / "mine.safetensors", state)
    loaded = model.denoiser.state_dict()
    for key, tensor in pipeline.transformer.state_dict().items():
        assert torch.equal(loaded[key], tensor.to(dtype).float()), key
    assert model.remarks == ()
    (remark,) = load(tmp_path / "mine.safetensors", {**state, f"{prefix}trainer.step": torch.ones(1)}).remarks
    assert "a tensor that the denoiser does not have, such as 'trainer.step'" in remark
    scales = {f"{prefix}joint_blocks.0.x_block.attn.qkv.weight.absmax": torch.ones(1)}
    assert "absmax', which changes the denoiser" in refusal(tmp_path / "mine.safetensors", {**state, **scales})
    del state[f"{prefix}joint_blocks.0.x_block.attn.ln_q.weight"]
    assert "mine.safetensors" in refusal(tmp_path / "mine.safetensors", state)


def test_a_file_of_the_xl_refiner_is_completed_by_the_folder_beside_it(tmp_path: Path) -> None:
    """It holds an autoencoder and one text encoder besides; the folder's own are taken."""
    pipeline = xl_refiner()
    pipeline.save_pretrained(tmp_path / "mine")
    (tmp_path / "mine/unet/diffusion_pytorch_model.safetensors").unlink()
    state = with_schedule(unet_state(pipeline.unet) | autoencoder_state(pipeline.vae))
    state["conditioner.embedders.0.model.ln_final.weight"] = torch.ones(16)
    model = load(tmp_path / "mine.safetensors", state)
    assert type(model.pipeline).__name__ == "StableDiffusionXLImg2ImgPipeline"
    for key, tensor in pipeline.unet.state_dict().items():
        assert torch.equal(model.denoiser.state_dict()[key], tensor), key
    shutil.rmtree(tmp_path / "mine")
    assert "a Stable Diffusion XL refiner" in refusal(tmp_path / "mine.safetensors", state)
