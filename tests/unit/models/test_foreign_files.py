"""A model folder made by an attacker: no code runs, no question is asked, and no file is read that was not checked."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from edadm_cli.errors import EXIT_INPUT, InputError
from edadm_cli.export.folder import write_pipeline
from edadm_cli.models.loading import load_model
from edadm_cli.models.sources.folder import read_folder

CPU = torch.device("cpu")
UNET = "unet/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


@pytest.fixture
def model(tiny_sd: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_sd, tmp_path / "model"))


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_model(str(folder), CPU, torch.float32)
    assert caught.value.exit_code == EXIT_INPUT
    assert "\n" not in caught.value.message
    return caught.value.message


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    change(content)
    path.write_text(json.dumps(content))


EVIL = {"AutoTokenizer": ["evil.Evil", None], "AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}
# The component that is exchanged, its new class, and the configuration that asks for the code.
ASKING = [
    ("tokenizer", "CLIPTokenizer", "tokenizer_config.json"),
    ("tokenizer", "CLIPProcessor", "tokenizer_config.json"),
    ("tokenizer", "LlavaProcessor", "processor_config.json"),
    ("tokenizer", "Qwen2VLProcessor", "preprocessor_config.json"),
    ("text_encoder", "CLIPTextModel", "config.json"),
    ("text_encoder", "VisionEncoderDecoderModel", "config.json"),
    ("text_encoder", "LlavaForConditionalGeneration", "config.json"),
    ("text_encoder", "RagModel", "config.json"),
]


def attack(model: Path, component: str, cls: str, marker: Path) -> None:
    code = f"open({str(marker)!r}, 'w')\nclass Evil:\n    pass\n"
    (model / component / "evil.py").write_text(code)
    edit_json(model / "model_index.json", lambda index: index.update({component: ["transformers", cls]}))


@pytest.mark.parametrize(("component", "cls", "config"), ASKING)
def test_code_that_a_configuration_asks_for_is_refused_without_a_question(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, component: str, cls: str, config: str
) -> None:
    answers = io.StringIO("y\n" * 100)
    monkeypatch.setattr(sys, "stdin", answers)
    attack(model, component, cls, tmp_path / "ran")
    edit_json(model / component / config, lambda content: content.update(auto_map=EVIL))
    assert "evil.py is code that comes with the model" in refusal(model)
    (model / component / "evil.py").rename(tmp_path / "evil.py")  # the code may also be said to be elsewhere
    assert "auto_map" in refusal(model)
    edit_json(model / component / config, lambda content: content.update(auto_map=None, text_config={"auto_map": EVIL}))
    assert "auto_map" in refusal(model)
    assert answers.tell() == 0
    assert not (tmp_path / "ran").exists()


def test_a_name_in_escapes_is_the_same_name(model: Path) -> None:
    path = model / "text_encoder/config.json"
    path.write_text(path.read_text().replace("{", '{"auto\\u005fmap": {"AutoModel": "owner/name--evil.Evil"},', 1))
    assert "auto_map" in refusal(model)


def test_a_library_that_asks_gets_no_answer(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = io.StringIO("y\n")
    monkeypatch.setattr(sys, "stdin", answers)

    def ask(*args: Any, **kwargs: Any) -> None:
        assert kwargs["trust_remote_code"] is False
        input("Do you wish to run the custom code? [y/N] ")

    monkeypatch.setattr("transformers.CLIPTokenizer.from_pretrained", ask)
    assert "tokenizer cannot be loaded" in refusal(model)
    assert answers.tell() == 0


@pytest.mark.parametrize(
    ("component", "config", "change"),
    [
        ("text_encoder", "config.json", {"attn_implementation": "owner/kernel:run"}),
        ("text_encoder", "config.json", {"_attn_implementation": {"text_config": "owner/kernel"}}),
        ("text_encoder", "config.json", {"use_pretrained_backbone": True, "backbone": "owner/name"}),
        (".", "model_index.json", {"custom_pipeline": "owner/pipeline"}),
        (".", "model_index.json", {"_class_name": ["pipeline", "Evil"]}),
        (".", "model_index.json", {"unet": ["evil", "UNet2DConditionModel"]}),
        (".", "model_index.json", {"unet": ["edadm_cli.__main__", "main"]}),
        (".", "model_index.json", {"unet": ["edadm_cli.cli.app", "Path"]}),
        (".", "model_index.json", {"unet": ["diffusers", "AutoModel"]}),
        (".", "model_index.json", {"../outside": ["diffusers", "UNet2DConditionModel"]}),
        (".", "model_index.json", {"a" * 5000: ["diffusers", "UNet2DConditionModel"]}),
    ],
)
def test_code_and_weights_from_elsewhere_are_refused(
    model: Path, component: str, config: str, change: dict[str, Any]
) -> None:
    shutil.copytree(model / "unet", model.parent / "outside")
    edit_json(model / component / config, lambda content: content.update(change))
    assert config in refusal(model)


def test_adapters_and_other_files_beside_a_component_do_not_reach_a_library(model: Path, tiny_sd: Path) -> None:
    (model / "text_encoder/adapter_config.json").write_text('{"base_model_name_or_path": "owner/name"}')
    (model / "text_encoder/model.fp16.safetensors").write_bytes(b"nothing")
    (model / "text_encoder/pytorch_model.bin").write_bytes(b"nothing")
    (model / "unet/diffusion_pytorch_model.non_ema.safetensors").write_bytes(b"nothing")
    loaded = load_model(str(model), CPU, torch.float32)
    original = load_model(str(tiny_sd), CPU, torch.float32)
    assert loaded.ref.fingerprint == original.ref.fingerprint
    for name in ("unet", "text_encoder"):
        states = (getattr(source.pipeline, name).state_dict() for source in (loaded, original))
        assert all(torch.equal(one, other) for one, other in zip(*(s.values() for s in states), strict=True))


@pytest.mark.parametrize("weights", [UNET, TEXT])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_an_index_that_names_other_weights_than_the_file_beside_it_is_refused(
    model: Path, weights: str, variant: str | None
) -> None:
    sound, infix = model / weights, "" if variant is None else f".{variant}"
    tensors = load_file(sound)
    chosen = sound.with_suffix(f"{infix}.safetensors")
    sound.rename(chosen)
    save_file(
        {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, sound.with_name("other.safetensors")
    )
    index = sound.with_name(f"{sound.stem}.safetensors.index{infix}.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, "other.safetensors")}))
    message = refusal(model)
    assert chosen.name in message
    assert index.name in message
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, chosen.name)}))
    load_model(str(model), CPU, torch.float32)  # both say the same


def test_shards_are_held_to_their_index(model: Path) -> None:
    tensors = load_file(model / UNET)
    (model / UNET).unlink()
    names = sorted(tensors)
    first, second = (model / "unet" / f"{part}.safetensors" for part in "ab")
    places = {name: first.name if position % 2 else second.name for position, name in enumerate(names)}
    index = model / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    shards = {file: {name: tensors[name] for name in names if places[name] == file.name} for file in (first, second)}
    for file, part in shards.items():
        save_file(part, file)
    before = load_model(str(model), CPU, torch.float32).ref.fingerprint
    save_file({name: tensor + 1 for name, tensor in shards[first].items()}, first)
    assert read_folder(model).fingerprint() != before
    save_file(shards[first] | shards[second], first)
    assert "twice" in refusal(model)
    save_file(dict(list(shards[first].items())[1:]), first)
    assert "lacks the tensor" in refusal(model)
    for name in ("../a.safetensors", "/etc/passwd", "config.json", 7):
        index.write_text(json.dumps({"weight_map": {**places, names[0]: name}}))
        assert index.name in refusal(model)


@pytest.mark.parametrize("place", ["tokenizer/notes.txt", UNET, "unet/config.json", "model_index.json", "vae"])
def test_links_out_of_the_folder_are_refused(model: Path, tmp_path: Path, place: str) -> None:
    secret = tmp_path / "secret"
    if (model / place).exists():
        (model / place).rename(secret)
    else:
        secret.write_text("secret")
    (model / place).symlink_to(secret)
    message = refusal(model)
    assert str(model / place) in message
    assert "link" in message
    secret.rename(tmp_path / "gone")
    assert place.partition("/")[0] in refusal(model)


@pytest.mark.parametrize("place", ["tokenizer/notes.txt", UNET, "unet/config.json", "model_index.json"])
def test_only_regular_files_are_opened(model: Path, place: str) -> None:
    (model / place).unlink(missing_ok=True)
    os.mkfifo(model / place)
    assert place.rpartition("/")[2] in refusal(model)


def test_links_of_the_hub_cache_are_followed(tiny_sd: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--owner--name/snapshots/c0ffee", tmp_path / "models--owner--name/blobs"
    shutil.copytree(tiny_sd, snapshot)
    blobs.mkdir()
    for number, file in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        file.rename(blobs / str(number))
        file.symlink_to(os.path.relpath(blobs / str(number), file.parent))
    model = load_model(str(snapshot), CPU, torch.float32)
    assert model.ref.fingerprint == read_folder(tiny_sd).fingerprint()
    write_pipeline(model, tmp_path / "export", {})
    assert (tmp_path / "export/text_encoder/model.safetensors").read_bytes() == (tiny_sd / TEXT).read_bytes()
    assert not any(path.is_symlink() for path in (tmp_path / "export").rglob("*"))


def test_only_known_files_go_into_an_export(model: Path, tmp_path: Path) -> None:
    for name in ("text_encoder/notes.txt", "tokenizer/weights.bin", "tokenizer/picture.png", "vae/other.safetensors"):
        (model / name).write_bytes(b"anything")
    (model / "tokenizer/chat_template.jinja").write_text("{{ messages }}")
    write_pipeline(load_model(str(model), CPU, torch.float32), tmp_path / "export", {})
    copied = {path.relative_to(tmp_path / "export").as_posix() for path in (tmp_path / "export").rglob("*.*")}
    assert "tokenizer/chat_template.jinja" in copied
    assert not copied & {
        "text_encoder/notes.txt",
        "tokenizer/weights.bin",
        "tokenizer/picture.png",
        "vae/other.safetensors",
    }


def test_a_chat_template_is_part_of_the_model(model: Path) -> None:
    fingerprints = {read_folder(model).fingerprint()}
    template = model / "tokenizer/chat_template.jinja"
    for text in ("{{ messages }}", "{{ messages[0] }}"):
        template.write_text(text)
        fingerprints.add(read_folder(model).fingerprint())
    assert len(fingerprints) == 3
