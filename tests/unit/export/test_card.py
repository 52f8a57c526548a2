"""The model card of an export, and what `edadm push` would send."""

from __future__ import annotations

import ast
import html
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt

from edadm_cli.cli.app import main
from edadm_cli.export.card import CARD_FILE, CardFacts, escape, model_card
from edadm_cli.export.push import prepare
from edadm_cli.export.usage import PipelineUse
from tests.unit.report.runs import RunMaker

REPOSITORY = "someone/tiny-w4a8"


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """An export with its evaluation in a run of a model from a local folder."""
    maker = RunMaker(tmp_path / "run")
    maker.facts["evaluation.json"]["grid"] = "images/0-full.png"
    maker.calibration().width("w4a8")
    return maker.run.path("export", "w4a8")


def _metadata(card: str) -> dict[str, Any]:
    fields: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return fields


def test_a_card_has_the_hubs_metadata_and_what_was_measured(export: Path) -> None:
    upload = prepare(export, REPOSITORY)
    card = upload.card("apache-2.0")
    fields = _metadata(card)
    assert fields["library_name"] == "diffusers"
    assert fields["license"] == "apache-2.0"
    assert "w4a8" in fields["tags"]
    for text in ("4-bit weights, 8-bit activations", "calibration", "PSNR to full precision |  | 31.25 |"):
        assert text in card
    assert f'from_pretrained("{REPOSITORY}")' in card
    assert "![Full precision above" in card
    assert "grid.png" in upload.files
    sizes = json.loads((export / "export.json").read_text())["size_mib"]
    whole = sum(size for name, size in sizes.items() if name not in ("denoiser_fp32", "ratio"))
    assert f"| pipeline on disk | {whole:,.1f} MiB" in card


@pytest.mark.parametrize(
    ("pipeline", "prompts", "images", "tag", "call"),
    [
        ("StableDiffusionPipeline", True, False, "text-to-image", 'image = pipeline("a prompt").images[0]'),
        ("DDPMPipeline", False, False, "unconditional-image-generation", "image = pipeline().images[0]"),
        ("DiTPipeline", False, False, "unconditional-image-generation", "pipeline(class_labels=[0])"),
        ("StableDiffusionImg2ImgPipeline", True, True, "image-to-image", 'image=load_image("picture.png"))'),
        ("FluxFillPipeline", True, True, "image-to-image", 'mask_image=load_image("mask.png"))'),
        ("WanPipeline", True, False, "text-to-video", 'frames = pipeline("a prompt").frames[0]'),
        ("StableVideoDiffusionPipeline", False, True, "image-to-video", 'image=load_image("picture.png")).frames[0]'),
    ],
)
def test_a_card_says_how_its_own_pipeline_is_called(
    pipeline: str, prompts: bool, images: bool, tag: str, call: str, tmp_path: Path
) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    use = PipelineUse.of_folder(tmp_path, prompts, images)
    code = use.code("someone/'\"odd")
    assert (use.tag(), call in code) == (tag, True)
    names = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    imported = {
        name.name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom) for name in node.names
    }
    assert names - {"pipeline", "image", "frames"} == imported


@pytest.mark.parametrize(
    ("bits", "text"),
    [
        ("w4a8", "4-bit weights, 8-bit activations"),
        ("w4.5a6", "4.5-bit weights on average, 6-bit activations"),
        ("w1.8miba8", "weights of several widths, with which the denoiser takes at most 1.8 MiB, 8-bit activations"),
    ],
)
def test_bits_are_in_words(bits: str, text: str, export: Path) -> None:
    facts = prepare(export, REPOSITORY).facts
    assert f"| bits | {text} |" in model_card(CardFacts(**{**vars(facts), "bits": bits}))


def test_nothing_of_the_machine_is_sent(export: Path, tmp_path: Path) -> None:
    upload = prepare(export, REPOSITORY)
    assert "manifest.json" not in upload.files
    card = upload.card(None)
    assert str(tmp_path) not in card
    assert "license" not in _metadata(card)


def test_what_users_typed_stays_text(export: Path) -> None:
    facts = prepare(export, REPOSITORY).facts
    changed = CardFacts(**{**vars(facts), "recipe": "a|b\n---\n<script>", "base": "[x](javascript:y)"})
    card = model_card(changed)
    assert "<script>" not in card.replace("\\<script\\>", "")
    assert "\n---\n" not in card.split("---\n", 2)[2]
    assert "[x](javascript:y)" not in card
    assert escape("a\x1b[31m") == "a\\[31m"
    assert escape("0.84, 1e-05 (3.5 dB), w4a8-2!") == "0.84, 1e-05 (3.5 dB), w4a8-2!"
    for text in ("- 1. +", "123. x", "![x](y) https://a.b", "# 2) &lt; a_b_ *c* `d`", "=== --- :smile: www.a.b ~~x~~"):
        assert MarkdownIt().render(escape(text)) == f"<p>{html.escape(text)}</p>\n"
    hostile = model_card(CardFacts(**{**vars(facts), "base_repository": 'a/b"\nlicense: mit'}))
    assert "license" not in _metadata(hostile)


def test_a_dry_run_needs_no_network_and_an_upload_without_one_is_bad_input(
    export: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.whoami", unreachable)
    assert main(["push", str(export), REPOSITORY, "--dry-run", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["status"] == "planned"
    assert facts["files"][CARD_FILE] > 0
    assert main(["push", str(export), REPOSITORY, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "grid.png" in shown
    assert "\n## How it was made\n" in shown
    assert main(["push", str(export), REPOSITORY]) == 3
    assert "cannot be reached from here, so nothing was uploaded to 'someone/tiny-w4a8'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ([], 2, "needs an export and a repository"),
        (["{export}", "no-owner"], 2, "a repository as owner/name"),
        (["{export}", "someone/two--dashes"], 2, "hold neither '--'"),
        (["{export}", "someone/ends.git"], 2, "'.git' at their end"),
        (["{export}", "someone/\u00e4"], 2, "a repository as owner/name"),
        (["{export}", "a/b\n"], 2, "a repository as owner/name"),
        (["{export}/unet", REPOSITORY], 3, "an export inside its run"),
        (["nowhere", REPOSITORY], 3, "an export inside its run"),
    ],
)
def test_what_cannot_be_pushed_ends_in_one_sentence(
    arguments: list[str], code: int, sentence: str, export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", *(argument.format(export=export) for argument in arguments)]) == code
    assert sentence in capsys.readouterr().err
