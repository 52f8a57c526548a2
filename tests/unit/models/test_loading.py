"""Loading: what is whole loads; what is broken or dangerous is refused by a sentence that names the file."""

from __future__ import annotations

import errno
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from edadm_cli.artifacts import RunFolder
from edadm_cli.collect import stage as collect
from edadm_cli.config import CollectConfig
from edadm_cli.errors import EXIT_INPUT, EXIT_MACHINE, EdadmError, InputError, MachineError
from edadm_cli.models.collected import CollectedRun
from edadm_cli.models.loading import load_model, resolve_device
from edadm_cli.models.pipeline_calls.sampling import sample
from edadm_cli.models.registry import known_models
from edadm_cli.models.sources import locating
from edadm_cli.models.sources.folder import read_folder
from edadm_cli.progress import current_long_step
from tests.denoisers.transformers import hunyuan_image, krea2

CPU = torch.device("cpu")
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def sd_copy(tiny_sd: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_sd, tmp_path / "model"))


def refusal(folder: Path | str) -> InputError:
    with pytest.raises(InputError) as caught:
        load_model(str(folder), CPU, torch.float32)
    message = caught.value.message
    assert caught.value.exit_code == EXIT_INPUT
    assert "\n" not in message
    assert message.endswith(".")
    return caught.value


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_folder_loads_in_the_given_dtype_ready_to_sample(tiny_sd: Path, dtype: torch.dtype) -> None:
    model = load_model(str(tiny_sd), CPU, dtype)
    assert model.denoiser_name == "unet"
    assert model.denoiser is model.pipeline.unet
    assert {p.dtype for p in model.denoiser.parameters()} == {dtype}
    assert not model.denoiser.training
    assert not any(p.requires_grad for p in model.denoiser.parameters())
    assert model.entry.guidance_scale == 7.5
    assert model.entry.image_size == 16
    assert model.ref.id == str(tiny_sd)


def test_loading_and_sampling_write_nothing_to_the_terminal(tiny_sd: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = load_model(str(tiny_sd), CPU, torch.float16)
    too_long = "words " * 500  # the text encoder takes 8 tokens, and diffusers says so for each prompt
    sample(model, seeds=[0], prompts=[too_long], num_steps=1, guidance_scale=1.0)
    assert capfd.readouterr() == ("", "")


def test_the_fingerprint_follows_content_not_place(tiny_sd: Path, sd_copy: Path) -> None:
    before = read_folder(tiny_sd).fingerprint()
    assert read_folder(sd_copy).fingerprint() == before
    edit_tensors(sd_copy / UNET, lambda t: t["conv_in.bias"].add_(1))
    after = read_folder(sd_copy).fingerprint()
    assert after != before
    edit_json(sd_copy / "scheduler/scheduler_config.json", lambda c: c.update(beta_end=0.02))
    assert read_folder(sd_copy).fingerprint() not in (before, after)


def test_weights_that_exist_as_fp16_variant_only_are_found(sd_copy: Path) -> None:
    (sd_copy / UNET).rename(sd_copy / "unet/diffusion_pytorch_model.fp16.safetensors")
    assert load_model(str(sd_copy), CPU, torch.float32).denoiser.dtype == torch.float32


def test_sharded_weights_load_and_a_missing_shard_is_named(tiny_sd: Path, sd_copy: Path) -> None:
    whole = load_model(str(tiny_sd), CPU, torch.float32)
    (sd_copy / UNET).unlink()
    whole.denoiser.save_pretrained(sd_copy / "unet", max_shard_size="60KB")
    shards = sorted((sd_copy / "unet").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    loaded = load_model(str(sd_copy), CPU, torch.float32)
    for name, parameter in whole.denoiser.named_parameters():
        assert torch.equal(parameter, loaded.denoiser.get_parameter(name))
    shards[0].unlink()
    assert shards[0].name in refusal(sd_copy).message


def test_pickled_weights_are_not_read_and_their_code_does_not_run(sd_copy: Path, tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    (sd_copy / UNET).unlink()
    (sd_copy / "unet/diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    message = refusal(sd_copy).message
    assert "diffusion_pytorch_model.bin is a pickle" in message
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "place",
    ["unet/custom.py", "None.py", "pipeline.py", "unet/diffusers.py"],
)
def test_code_that_lies_beside_a_model_never_runs(sd_copy: Path, tmp_path: Path, place: str) -> None:
    (sd_copy / place).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass UNet2DConditionModel: pass\n")
    if place == "unet/custom.py":
        edit_json(sd_copy / "model_index.json", lambda c: c.update(unet=["custom", "UNet2DConditionModel"]))
    if place == "pipeline.py":
        edit_json(sd_copy / "model_index.json", lambda c: c.update(_class_name=["pipeline", "MyPipeline"]))
    if place == "None.py":
        load_model(str(sd_copy), CPU, torch.float32)  # diffusers' own loader would take it for a pipeline
    else:
        refusal(sd_copy)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("library", "cls"),
    [
        ("os", "system"),
        ("subprocess", "Popen"),
        ("diffusers", "DiffusionPipeline"),
        ("transformers", "AutoModel"),
        ("transformers", "AutoTokenizer"),
        ("diffusers.utils", "logging"),
        ("diffusers", "NoSuchModel"),
        ("..", "x"),
    ],
)
def test_components_from_elsewhere_are_refused(sd_copy: Path, library: str, cls: str) -> None:
    edit_json(sd_copy / "model_index.json", lambda c: c.update(unet=[library, cls]))
    assert "model_index.json" in refusal(sd_copy).message


@pytest.mark.parametrize("keep", [0, 5, 400, -1])
def test_truncated_weights_are_named(sd_copy: Path, keep: int) -> None:
    content = (sd_copy / UNET).read_bytes()
    (sd_copy / UNET).write_bytes(content[:keep])
    assert UNET in refusal(sd_copy).message


def test_foreign_files_in_place_of_weights_are_named(sd_copy: Path) -> None:
    (sd_copy / UNET).write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(4000))
    assert UNET in refusal(sd_copy).message


def test_weights_of_another_shape_are_named(sd_copy: Path) -> None:
    edit_tensors(sd_copy / UNET, lambda t: t.update({"conv_in.weight": torch.zeros(9, 4, 3, 3)}))
    message = refusal(sd_copy).message
    assert UNET in message
    assert "conv_in.weight" in message


@pytest.mark.parametrize(
    ("file", "tensor"),
    [(UNET, "conv_out.weight"), ("text_encoder/model.safetensors", "text_model.final_layer_norm.weight")],
)
def test_a_missing_tensor_is_not_made_up(sd_copy: Path, file: str, tensor: str) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[next(name for name in tensors if name.endswith(tensor.removeprefix("text_model.")))]

    edit_tensors(sd_copy / file, drop)
    message = refusal(sd_copy).message
    assert file in message
    assert "lacks the tensor" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(sd_copy: Path, value: float) -> None:
    edit_tensors(sd_copy / UNET, lambda t: t["mid_block.resnets.0.conv1.weight"].fill_(value))
    message = refusal(sd_copy).message
    assert UNET in message
    assert "'mid_block.resnets.0.conv1.weight'" in message


@pytest.mark.parametrize("missing", ["unet", "tokenizer", "unet/config.json", "scheduler/scheduler_config.json"])
def test_missing_parts_are_named(sd_copy: Path, missing: str) -> None:
    path = sd_copy / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert missing.partition("/")[0] in refusal(sd_copy).message


def test_an_index_without_a_denoiser_or_a_needed_component_is_reported(sd_copy: Path) -> None:
    edit_json(sd_copy / "model_index.json", lambda c: c.pop("unet"))
    assert "'unet'" in refusal(sd_copy).message


def test_a_broken_index_is_reported(sd_copy: Path, tmp_path: Path) -> None:
    (sd_copy / "model_index.json").write_text("{")
    assert "model_index.json" in refusal(sd_copy).message
    assert "no model_index.json" in refusal(tmp_path).message


def test_a_config_of_nonsense_is_reported(sd_copy: Path) -> None:
    edit_json(sd_copy / "unet/config.json", lambda c: c.update(block_out_channels="banana"))
    assert "unet" in refusal(sd_copy).message


def test_what_is_no_model_is_reported(tmp_path: Path) -> None:
    (tmp_path / "model.txt").write_bytes(b"anything")
    assert "is a file" in refusal(tmp_path / "model.txt").message
    (tmp_path / "model.ckpt").write_bytes(b"anything")
    assert "no checkpoint" in refusal(tmp_path / "model.ckpt").message
    assert "neither a known name" in refusal("no-such-model").message
    assert "models/ldm/lsun_beds256/model.ckpt" in refusal("ldm-bedroom").message


@pytest.mark.parametrize("name", ["sd15", "nobody/nothing"])
def test_a_hub_model_without_a_network_is_one_sentence(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert "cannot be reached" in refusal(name).message


def test_devices_are_resolved_or_refused() -> None:
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type in ("cpu", "cuda")
    for name in ("cuda:99", "tpu", "mps", "cpu:3", ""):
        with pytest.raises(MachineError, match="no device") as caught:
            resolve_device(name)
        assert caught.value.exit_code == EXIT_MACHINE


def test_an_entry_changes_the_scheduler(tiny_ddpm: Path) -> None:
    entry = known_models()["ddpm-cifar10"]
    model = load_model(str(tiny_ddpm), CPU, torch.float32, entry=entry)
    assert type(model.pipeline.scheduler).__name__ == "QuadraticDDIMScheduler"
    assert model.pipeline.scheduler.config.clip_sample is False
    assert model.ref.id == str(tiny_ddpm)
    assert model.entry is entry


def test_every_known_model_is_complete() -> None:
    for name, entry in known_models().items():
        assert entry.name == name
        assert entry.description
        assert entry.sampler
        assert (entry.source == "shipped") == name.startswith(("digits-", "emoji-"))
        assert (entry.source == "random") == name.endswith("-random")
    with pytest.raises(EdadmError):
        load_model("digits", CPU, torch.float32)


def test_a_hub_model_is_loaded_again_at_the_commit_it_was_collected_from(
    tiny_ddpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None]] = []

    def download(repo_id: str, revision: str | None) -> tuple[Path, str]:
        asked.append((repo_id, revision))
        return tiny_ddpm, revision or "c0ffee"

    monkeypatch.setattr(locating, "download", download)
    run = RunFolder(tmp_path / "run")
    config = CollectConfig(model="nobody/tiny", num_trajectories=1, num_steps=2, device="cpu")
    collect.run(config, run)
    assert run.open("collect").manifest.model.revision == "c0ffee"
    assert CollectedRun.open(run).load(CPU, torch.float32).ref.revision == "c0ffee"
    assert asked == [("nobody/tiny", None), ("nobody/tiny", "c0ffee")]


@pytest.mark.parametrize("variants", [("fp16",), ("bf16",), ()])
def test_a_hub_repository_with_variants_only_is_fetched_as_such(
    tiny_ddpm: Path, monkeypatch: pytest.MonkeyPatch, variants: tuple[str, ...]
) -> None:
    asked: list[str | None] = []

    def fetch(repo_id: str, *, variant: str | None, **options: Any) -> str:
        assert options["trust_remote_code"] is False
        asked.append(variant)
        if variant not in variants:
            raise OSError(f"Could not find the necessary `safetensors` weights in {'x' * 900} (variant={variant})")
        return str(tiny_ddpm)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *args, **options: None)
    monkeypatch.setattr("diffusers.DiffusionPipeline.download", fetch)
    if variants:
        assert load_model("owner/name", CPU, torch.float32).denoiser_name == "unet"
        assert asked[-1] == variants[0]
    else:
        message = refusal("owner/name").message
        assert "no safetensors weights" in message
        assert len(message) < 200


def test_a_download_says_how_much_has_arrived(tiny_ddpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = tmp_path / "models--owner--name/blobs"
    blobs.mkdir(parents=True)
    (blobs / "of-an-earlier-download").write_bytes(bytes(2**20))
    seen: list[str | None] = []

    def fetch(repo_id: str, **options: Any) -> str:
        seen.append(current_long_step())
        (blobs / "0123.incomplete").write_bytes(bytes(3 * 2**20))
        seen.append(current_long_step())
        return str(tiny_ddpm)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *args, **options: None)
    monkeypatch.setattr("diffusers.DiffusionPipeline.download", fetch)
    load_model("owner/name", CPU, torch.float32)
    assert seen == [f"downloading owner/name from the hub: {mib} MiB" for mib in (0, 3)]
    assert current_long_step() is None


def test_a_download_for_which_there_is_no_space_is_for_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(repo_id: str, **options: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device", "/cache/blob")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *args, **options: None)
    monkeypatch.setattr("diffusers.DiffusionPipeline.download", fetch)
    with pytest.raises(MachineError, match="/cache/blob: the disk is full"):
        load_model("owner/name", CPU, torch.float32)


def test_options_of_a_pipeline_that_are_lists_and_its_guiders_are_loaded(tmp_path: Path) -> None:
    krea2().save_pretrained(tmp_path / "krea2")
    pipeline: Any = load_model(str(tmp_path / "krea2"), CPU, torch.float32).pipeline
    assert list(pipeline.text_encoder_select_layers) == [1, 2]
    hunyuan_image().save_pretrained(tmp_path / "hunyuan")
    loaded: Any = load_model(str(tmp_path / "hunyuan"), CPU, torch.float32).pipeline
    assert loaded.guider.config["enabled"] is False
    (tmp_path / "hunyuan" / "guider" / "guider_config.json").unlink()
    with pytest.raises(InputError, match=r"guider_config\.json"):
        load_model(str(tmp_path / "hunyuan"), CPU, torch.float32)
