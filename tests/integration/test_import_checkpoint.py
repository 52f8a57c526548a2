"""CompVis checkpoints become pipelines that compute what the checkpoint computes, or are refused by name."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from edadm_cli.errors import EXIT_INPUT, InputError, UsageError
from edadm_cli.models.architecture import load_architecture
from edadm_cli.models.checkpoints import compvis
from edadm_cli.models.checkpoints.compvis_config import read_config
from edadm_cli.models.loaded import LoadedModel
from edadm_cli.models.loading import load_model
from edadm_cli.models.pipeline_calls.sampling import sample
from edadm_cli.models.random_models import build_random_pipeline
from tests.unit.models.compvis import (
    STAGE,
    UNET,
    State,
    autoencoder_state,
    ema_of,
    run_decoder,
    run_unet,
    unet_state,
    with_schedule,
)
from tests.unit.models.configs import real, tiny

CPU = torch.device("cpu")
KINDS = ("ldm-bedroom", "ldm-church", "ldm-imagenet")
FORMS: dict[str, dict[str, Any]] = {
    "ldm-bedroom": {"num_heads": None, "head_size": 16, "levels": 2, "blocks": 1},
    "ldm-church": {"num_heads": 4, "head_size": None, "levels": 3, "blocks": 1, "scale_shift": True},
    "ldm-imagenet": {"num_heads": 1, "head_size": None, "levels": 2, "blocks": 1},
}


def write_config(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def write_state(path: Path, state: State) -> Path:
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save({"state_dict": state, "global_step": 7, "callbacks": {"a": 1.5}}, path)
    return path


def build(folder: Path, kind: str, change: Callable[[dict[str, Any]], None] | None = None) -> tuple[Any, State]:
    """A pipeline with random weights, its configuration on disk, and its weights under CompVis names."""
    config = tiny(kind)
    if change is not None:
        change(config["model"]["params"])
    model = read_config(write_config(folder, config))
    pipeline = build_random_pipeline(model.architecture, 0, torch.float32)
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    state = unet_state(denoiser, model.heads_first)
    state |= autoencoder_state(pipeline.vqvae if hasattr(pipeline, "vqvae") else pipeline.vae)
    if kind == "ldm-imagenet":
        state["cond_stage_model.embedding.weight"] = denoiser.label_embedding.weight.clone()
    if kind == "ldm-church":
        state["scale_factor"] = torch.tensor(0.75)
    return pipeline, with_schedule(state)


def decoder_of(model: LoadedModel) -> Any:
    return getattr(model.pipeline, "vqvae", None) or model.pipeline.vae


def predict(model: LoadedModel, x: Tensor, label: int) -> Tensor:
    labels = {"class_labels": torch.full((len(x),), label)} if model.denoiser_name == "transformer" else {}
    with torch.no_grad():
        output: Tensor = model.denoiser(x, torch.tensor(321), **labels).sample
    return output


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_an_imported_checkpoint_computes_what_it_holds(tmp_path: Path, kind: str, suffix: str) -> None:
    _, state = build(tmp_path, kind)
    model = load_model(str(write_state(tmp_path / f"model{suffix}", state)), CPU, torch.float32)

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, model.denoiser.config.in_channels, 8, 8, generator=generator)
    context = state["cond_stage_model.embedding.weight"][17].expand(2, 1, -1) if kind == "ldm-imagenet" else None
    expected = run_unet(state, x, 321, **FORMS[kind], context=context)
    torch.testing.assert_close(predict(model, x, 17), expected, atol=2e-5, rtol=1e-4)

    decoder, z = decoder_of(model), torch.randn(2, x.shape[1], 8, 8, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(
            decoder.decode(z).sample, run_decoder(state, z, levels=2, blocks=1), atol=2e-5, rtol=1e-4
        )
    assert decoder.config.scaling_factor == (0.75 if kind == "ldm-church" else 1.0)
    assert model.folder is None


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_arrives_where_it_came_from(tmp_path: Path, kind: str) -> None:
    pipeline, state = build(tmp_path, kind)
    model = load_model(str(write_state(tmp_path / "model.ckpt", state)), CPU, torch.float32)
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            loaded = model.pipeline.components[name].state_dict()
            original = component.state_dict()
            assert loaded.keys() == original.keys()
            assert all(torch.equal(loaded[key], tensor) for key, tensor in original.items())


def test_the_newer_order_of_query_key_and_value_is_read(tmp_path: Path) -> None:
    def newer(params: dict[str, Any]) -> None:
        params["unet_config"]["params"]["use_new_attention_order"] = True

    _, state = build(tmp_path, "ldm-bedroom", newer)
    model = load_model(str(write_state(tmp_path / "model.ckpt", state)), CPU, torch.float32)
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    form = FORMS["ldm-bedroom"]
    newer_output = run_unet(state, x, 321, **form, heads_first=False)
    torch.testing.assert_close(predict(model, x, 0), newer_output, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(run_unet(state, x, 321, **form), newer_output, atol=1e-2)


@pytest.mark.parametrize("use_ema", [True, False])
def test_moving_averages_are_taken_when_the_configuration_uses_them(tmp_path: Path, use_ema: bool) -> None:
    _, state = build(tmp_path, "ldm-bedroom", lambda params: params.update(use_ema=use_ema))
    averages = {name: tensor * 0.5 for name, tensor in ema_of(state).items()}
    model = load_model(str(write_state(tmp_path / "model.ckpt", {**state, **averages})), CPU, torch.float32)
    raw = state[f"{UNET}input_blocks.0.0.weight"]
    assert torch.equal(model.denoiser.conv_in.weight, raw * 0.5 if use_ema else raw)


@pytest.mark.parametrize("kind", KINDS)
def test_an_imported_model_samples_and_its_seeds_decide(tmp_path: Path, kind: str) -> None:
    _, state = build(tmp_path, kind)
    model = load_model(str(write_state(tmp_path / "model.ckpt", state)), CPU, torch.float32)
    noisy = LoadedModel(
        model.ref, model.entry.model_copy(update={"eta": 1.0}), model.pipeline, model.denoiser_name, None
    )
    chosen, guidance = (model, 3.0) if kind == "ldm-imagenet" else (noisy, None)
    together = sample(chosen, seeds=[1, 2], prompts=None, num_steps=3, guidance_scale=guidance)
    alone = sample(chosen, seeds=[2], prompts=None, num_steps=3, guidance_scale=guidance)
    assert together.images.shape == (2, 3, 16, 16)
    torch.testing.assert_close(together.latents[1:], alone.latents, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_known_configurations_are_the_shipped_architectures(tmp_path: Path, kind: str) -> None:
    model = read_config(write_config(tmp_path, real(kind)))
    assert model.architecture == load_architecture(kind)
    assert model.known_as == kind
    assert model.use_ema == (kind != "ldm-imagenet")
    assert model.scale_in_checkpoint == (kind == "ldm-church")


def test_an_element_type_that_the_pipeline_cannot_sample_in_is_refused(tmp_path: Path) -> None:
    _, state = build(tmp_path, "ldm-bedroom")
    with pytest.raises(UsageError, match="float32 only"):
        load_model(str(write_state(tmp_path / "model.ckpt", state)), CPU, torch.bfloat16)


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_model(str(path), CPU, torch.float32)
    assert caught.value.exit_code == EXIT_INPUT
    assert "\n" not in caught.value.message
    assert caught.value.message.endswith(".")
    return caught.value.message


@pytest.mark.parametrize(
    ("change", "reference"),
    [
        (lambda s: s.pop(f"{UNET}middle_block.1.qkv.weight"), ("lacks", "middle_block.1.qkv.weight")),
        (lambda s: s.pop(f"{STAGE}decoder.up.1.block.0.conv1.bias"), ("lacks", "decoder.up.1.block.0.conv1.bias")),
        (lambda s: s.update({f"{UNET}control.weight": torch.zeros(1)}), ("does not take", "control.weight")),
        (lambda s: s.update({"lora.up.weight": torch.zeros(1)}), ("does not take", "lora.up.weight")),
        (lambda s: s.update({f"{UNET}out.2.weight": torch.zeros(3, 9, 3, 3)}), ("shape", "[3, 9, 3, 3] for [3, 32")),
        (lambda s: s[f"{UNET}out.2.weight"].fill_(float("nan")), ("not finite", "out.2.weight")),
    ],
)
def test_keys_that_do_not_fit_are_named(
    tmp_path: Path, change: Callable[[State], Any], reference: tuple[str, str]
) -> None:
    _, state = build(tmp_path, "ldm-bedroom")
    change(state)
    message = refusal(write_state(tmp_path / "model.ckpt", state))
    assert all(part in message for part in reference)


def test_a_scale_that_was_measured_is_not_made_up(tmp_path: Path) -> None:
    _, state = build(tmp_path, "ldm-church")
    del state["scale_factor"]
    assert "scale_factor" in refusal(write_state(tmp_path / "model.ckpt", state))


def test_without_a_configuration_only_known_checkpoints_are_read(tmp_path: Path) -> None:
    _, state = build(tmp_path, "ldm-bedroom")
    (tmp_path / "config.yaml").unlink()
    path = write_state(tmp_path / "model.ckpt", state)
    assert "none of the latent diffusion checkpoints" in refusal(path)
    state[f"{UNET}input_blocks.0.0.weight"] = torch.zeros(224, 3, 3, 3)
    message = refusal(write_state(path, state))
    assert "lacks" in message
    assert "input_blocks.3.0.op" not in message.partition("lacks")[0]


@pytest.mark.parametrize(
    ("change", "reference"),
    [
        (lambda p: p.update(first_stage_config={"target": "os.system", "params": {"ddconfig": {}}}), "no 'ch_mult'"),
        (lambda p: p["first_stage_config"].update(target="os.system"), "first stage system"),
        (lambda p: p["unet_config"]["params"].pop("channel_mult"), "channel_mult"),
        (lambda p: p["unet_config"]["params"].update(channel_mult="banana"), "config.yaml"),
        (lambda p: p.update(cond_stage_config={"target": "x.BERTEmbedder", "params": {}}), "BERTEmbedder"),
        (lambda p: p.update(parameterization="v"), "parameterization: v"),
    ],
)
def test_configurations_of_something_else_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], reference: str
) -> None:
    _, state = build(tmp_path, "ldm-bedroom")
    config = tiny("ldm-bedroom")
    change(config["model"]["params"])
    write_config(tmp_path, config)
    assert reference in refusal(write_state(tmp_path / "model.ckpt", state))


def test_code_in_a_configuration_does_not_run(tmp_path: Path) -> None:
    _, state = build(tmp_path, "ldm-bedroom")
    (tmp_path / "config.yaml").write_text(f"model: !!python/object/apply:os.mkdir ['{tmp_path / 'ran'}']\n")
    assert "plain YAML" in refusal(write_state(tmp_path / "model.ckpt", state))
    assert not (tmp_path / "ran").exists()


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "callbacks": _Payload(tmp_path / "ran")}, path)
    assert "could carry code" in refusal(path)
    path.write_bytes(pickle.dumps(_Payload(tmp_path / "ran")))
    refusal(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("keep", [0, 10, 2000, -200])
def test_truncated_and_foreign_files_are_reported(tmp_path: Path, keep: int) -> None:
    _, state = build(tmp_path, "ldm-bedroom")
    for suffix in (".ckpt", ".safetensors"):
        path = write_state(tmp_path / f"model{suffix}", state)
        path.write_bytes(path.read_bytes()[:keep])
        assert path.name in refusal(path)
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(4000))
        assert path.name in refusal(path)


def test_other_models_in_one_file_are_reported(tmp_path: Path) -> None:
    path = write_state(tmp_path / "model.safetensors", {"transformer.layer.weight": torch.zeros(2, 2)})
    assert "transformer.layer.weight" in refusal(path)
    (tmp_path / "empty.ckpt").write_bytes(b"")
    assert "empty.ckpt" in refusal(tmp_path / "empty.ckpt")


def test_a_mention_of_a_lightning_callback_is_no_obstacle(tmp_path: Path) -> None:
    """Real checkpoints key their callbacks by class, which `weights_only` would refuse."""
    import sys
    import types

    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    callback = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = callback  # type: ignore[attr-defined]
    _, state = build(tmp_path, "ldm-bedroom")
    names = ["pytorch_lightning", "pytorch_lightning.callbacks", module.__name__]
    sys.modules.update({name: types.ModuleType(name) for name in names[:2]} | {module.__name__: module})
    try:
        torch.save({"state_dict": state, "callbacks": {callback: {"best": 1.0}}}, tmp_path / "model.ckpt")
    finally:
        for name in names:
            del sys.modules[name]
    load_model(str(tmp_path / "model.ckpt"), CPU, torch.float32)


@pytest.mark.parametrize("num_labels", [11, 1203])
@pytest.mark.parametrize("has_config", [True, False])
def test_any_number_of_classes_is_converted(
    tmp_path: Path, num_labels: int, has_config: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def count(params: dict[str, Any]) -> None:
        params["cond_stage_config"]["params"]["n_classes"] = num_labels

    _, state = build(tmp_path, "ldm-imagenet", count)
    embedding = state["cond_stage_model.embedding.weight"]
    assert embedding.shape[0] == num_labels
    if not has_config:  # the number shows in the checkpoint
        plain = read_config(write_config(tmp_path, tiny("ldm-imagenet")))
        (tmp_path / "config.yaml").unlink()
        monkeypatch.setattr(compvis, "known_model", lambda shape: plain)
    model = load_model(str(write_state(tmp_path / "model.ckpt", state)), CPU, torch.float32)
    assert model.denoiser.num_classes == num_labels - 1

    x = torch.randn(2, model.denoiser.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(1))
    for label, row in ((3, 3), (1000, num_labels - 1)):  # 1000 is what DiTPipeline calls no class
        expected = run_unet(state, x, 321, **FORMS["ldm-imagenet"], context=embedding[row].expand(2, 1, -1))
        torch.testing.assert_close(predict(model, x, label), expected, atol=2e-5, rtol=1e-4)

    model.pipeline.save_pretrained(tmp_path / "saved")
    again = load_model(str(tmp_path / "saved"), CPU, torch.float32)
    assert torch.equal(predict(again, x, 1000), predict(model, x, 1000))
    images = sample(model, seeds=[1, 2], prompts=None, num_steps=2, guidance_scale=3.0).images
    assert images.shape[0] == 2


def test_a_configuration_is_found_beside_a_link_to_the_checkpoint(tmp_path: Path) -> None:
    """The files are as in the hub's cache: links to files whose names mean nothing."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    _, state = build(blobs, "ldm-church")
    write_state(blobs / "model.ckpt", state).rename(blobs / "6ce0161689b3")
    (blobs / "config.yaml").rename(blobs / "0a1b2c3d4e5f")
    (snapshot / "model.ckpt").symlink_to(blobs / "6ce0161689b3")
    (snapshot / "config.yaml").symlink_to(blobs / "0a1b2c3d4e5f")
    model = load_model(str(snapshot / "model.ckpt"), CPU, torch.float32)
    assert decoder_of(model).config.scaling_factor == 0.75
