"""The page: whole, self-contained, escaped, equal for equal artifacts, and true to the artifacts."""

from __future__ import annotations

import base64
import itertools
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from edadm_cli.artifacts.files import file_sha256
from edadm_cli.cli.app import main
from edadm_cli.errors import InputError
from edadm_cli.report import stage
from edadm_cli.report.formats import NOTHING
from tests.unit.report.parsing import Element, parse
from tests.unit.report.runs import CONFIGS, NUM_SHOWN, RunMaker, png

TIMES = "\u00d7"
HOSTILE = "<script>alert('1')</script> \"quoted\" & 'more' --> </style><img src=x onerror=alert(1)>\x00"
_CLIP = {"metrics": ["fid", "kid"], "clip_model": "ViT-B-32", "clip_pretrained": "0" * 64}
SECTIONS = ["figures", "images", "quality", "model", "selection", "reconstruction", "export", "provenance"]


def _page(maker: RunMaker, bits: list[str] | None = None) -> Element:
    return parse(stage.run(maker.run, bits).read_text(encoding="utf-8"))


def _ids(page: Element) -> list[str]:
    return [element.attributes["id"] for element in page.walk() if "id" in element.attributes]


def _rows(page: Element, label: str) -> dict[str, list[str]]:
    (frame,) = page.all("div", role="region", **{"aria-label": label})
    rows = [row.row() for row in frame.all("tr")]
    return {row[0]: row[1:] for row in rows}


def _facts(page: Element) -> dict[str, str]:
    names, values = page.all("dt"), page.all("dd")
    return {name.text: value.text for name, value in zip(names, values, strict=True)}


def test_a_whole_run_has_every_section(maker: RunMaker) -> None:
    page = _page(maker.calibration().width("w4a8"))
    assert _ids(page) == SECTIONS
    assert page.all("html")[0].attributes["lang"] == "en"
    assert [heading.text for heading in page.all("h1")] == ["tiny-model → W4A8"]
    assert page.all("p", class_="missing") == []
    assert {link.attributes["href"] for link in page.all("a")} <= {f"#{name}" for name in SECTIONS}


def test_the_lead_says_which_components_are_quantized(maker: RunMaker) -> None:
    maker.calibration().width("w8a8")
    lead = _page(maker).all("p", class_="lead")[0]
    assert lead.text.endswith("Its denoiser was quantized after training; the rest of the pipeline is unchanged.")
    encoder = {"bits": 8, "layers": 12, "size_mib": 1.0, "float_mib": 3.5}
    maker.facts["export.json"]["text_encoders"] = {"text_encoder": encoder}
    maker.width("w4a8")
    lead = _page(maker).all("p", class_="lead")[0]
    assert lead.text.endswith("The text encoders of W4A8 have 8-bit weights; the rest is unchanged.")


def test_headings_leave_no_level_out(maker: RunMaker) -> None:
    maker.calibration().width("w4a8")
    for bits in (["w4a8"], None):
        levels = [int(e.tag[1]) for e in _page(maker, bits).walk() if re.fullmatch("h[1-6]", e.tag)]
        assert all(after - before <= 1 for before, after in itertools.pairwise(levels)), levels
        maker.width("w8a8")


def test_the_page_needs_nothing_else(maker: RunMaker) -> None:
    text = stage.run(maker.calibration().width("w4a8").run).read_text(encoding="utf-8")
    page = parse(text)
    for tag in ("script", "link", "iframe", "object", "base", "form"):
        assert page.all(tag) == []
    for element in page.walk():
        for name, value in element.attributes.items():
            assert not name.startswith("on")
            if name in ("href", "src", "srcset", "xlink:href"):
                assert value.startswith(("#", "data:image/png;base64,"))
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert "url(" not in text
    (policy,) = [m for m in page.all("meta") if "http-equiv" in m.attributes]
    assert policy.attributes["content"].startswith("default-src 'none'; img-src data:")


def test_what_a_user_typed_stays_text(tmp_path: Path) -> None:
    maker = RunMaker(tmp_path / "run", model=HOSTILE)
    maker.recipe = HOSTILE
    maker.facts["sampling.json"]["prompts"] = [HOSTILE]
    maker.facts["sampling.json"]["entry"]["description"] = HOSTILE
    for entry in maker.facts["evaluation.json"]["shown"]:
        entry["prompt"] = HOSTILE
    maker.facts["evaluation.json"]["real"] = HOSTILE
    maker.facts["plan.json"]["kept"] = {"layer": HOSTILE}
    maker.facts["units.json"]["units"][0]["name"] = HOSTILE
    page = _page(maker.calibration().width("w4a8"))
    assert page.all("script") == []
    assert len(page.all("style")) == 1
    assert len(page.all("img")) == 2 * NUM_SHOWN
    assert all(not name.startswith("on") for element in page.walk() for name in element.attributes)
    shown = HOSTILE.replace("\x00", "\ufffd")
    assert page.all("figcaption")[0].text == shown
    assert page.all("img")[0].attributes["alt"].startswith(f"\u201c{shown}\u201d")
    assert _facts(page)["recipe"] == shown
    assert shown in page.all("h1")[0].text
    assert _rows(page, "Layers of W4A8")["layer"][-1] == f"left in float: {shown}"


def test_equal_artifacts_give_equal_bytes_wherever_they_lie(maker: RunMaker, tmp_path: Path) -> None:
    first = stage.run(maker.calibration().width("w4a8").run)
    elsewhere = tmp_path / "another place" / "moved"
    shutil.copytree(maker.run.root, elsewhere)
    hashes = {file_sha256(first)}
    hashes.add(file_sha256(stage.run(maker.run)))
    hashes.add(file_sha256(stage.run(type(maker.run)(elsewhere))))
    assert len(hashes) == 1
    assert str(tmp_path) not in first.read_text(encoding="utf-8")


def test_of_the_environment_only_versions_are_listed(maker: RunMaker) -> None:
    versions = _rows(_page(maker.calibration().width("w4a8")), "Versions")
    assert {"edadm", "python", "torch"} <= set(versions)
    assert not {"device", "seconds", "peak_memory_mib", "peak_cuda_memory_mib"} & set(versions)


def test_every_metric_is_that_of_the_artifact(maker: RunMaker) -> None:
    page = _page(maker.calibration().width("w4a8"))
    cards = [(card.all("p")[0].text, card.all("p")[1].text) for card in page.all("div", class_="card")]
    assert cards == [
        ("Smaller by", f"6.50{TIMES}"),
        ("Fréchet distance", "1.375"),
        ("Prompt accuracy", "98.75\u00a0%"),
        ("Relative L2", "0.0875"),
        ("PSNR", "31.2 dB"),
    ]
    quality = _rows(page, "Quality of W4A8")
    assert quality["Fréchet distance↓ lower is better"] == ["1.125", "1.375", "digits/pooled", "80"]
    assert quality["Prompt accuracy↑ higher is better"][:2] == ["100\u00a0%", "98.75\u00a0%"]
    assert quality["a new metric"] == [NOTHING, "3.000", "somewhere", "80"]
    sizes = _rows(page, "Sizes of W4A8")
    assert list(sizes) == ["component", "unet, fp32 before", "unet, W4A8", "vae", "scheduler"]
    assert [sizes[name][0] for name in list(sizes)[1:]] == [
        "13.00\u00a0MiB", "2.00\u00a0MiB", "0.50\u00a0MiB", "0.41\u00a0KiB"
    ]  # fmt: skip
    facts = _facts(page)
    assert facts["integer arithmetic, worst layer's relative L2"] == f"2.50 {TIMES} 10⁻⁷"
    assert facts["quantized"] == "3 of 3 planned"
    assert facts["loss before"].startswith("20.50")
    assert [p.text for p in page.all("p", class_="caution")] == ["Without FID, KID: no weights", "FID of few images"]


def test_every_layer_is_listed_with_what_became_of_it(maker: RunMaker) -> None:
    layers = _rows(_page(maker.calibration().width("w4a8")), "Layers of W4A8")
    assert layers == {
        "layer": ["weight bits", "activation bits", "channel parts", "note"],
        "conv_in": ["8", "8", "", ""],
        "mid.a": ["4", "8", "96 + 64", ""],
        "mid.b": ["4", "float", "", ""],
        "mid.attn": ["", "8, probabilities 6", "", "both products of the attention"],
        "mid.skip": ["", "", "", "left in float: excluded by the recipe's pattern 'mid.s*'"],
    }


def test_images_stand_beside_those_of_the_same_seed(maker: RunMaker) -> None:
    page = _page(maker.calibration().width("w8a8").width("w4a4"))
    (wall,) = page.all("div", class_="wall")
    figures = wall.all("figure")
    assert len(figures) == NUM_SHOWN
    for place, figure in enumerate(figures):
        actual = [base64.b64decode(img.attributes["src"].partition(",")[2]) for img in figure.all("img")]
        assert actual == [png(10 * place), png(10 * place + 8), png(10 * place + 4)]
        labels = [label.children[0] for label in figure.all("span", class_="label")]
        assert labels == ["full precision", "W8A8", "W4A4"]
        assert all(img.attributes["alt"] and img.attributes["width"] == "8" for img in figure.all("img"))
        assert figure.all("figcaption")[0].text == f"prompt number {place}"


def test_full_precision_of_other_seeds_gets_a_wall_of_its_own(maker: RunMaker) -> None:
    maker.calibration().width("w8a8")
    for entry in maker.facts["evaluation.json"]["shown"]:
        entry["seed"] += 1
    page = _page(maker.width("w4a8"))
    assert len(page.all("div", class_="wall")) == 2
    assert len(page.all("img")) == 4 * NUM_SHOWN


def test_other_images_of_the_same_seeds_get_a_wall_of_their_own(maker: RunMaker) -> None:
    """As after an evaluation with another number of steps."""
    maker.calibration().width("w8a8")
    maker.brightness = 100
    page = _page(maker.width("w4a8"))
    assert len(page.all("div", class_="wall")) == 2


def test_images_without_prompts_are_named_by_their_seeds(maker: RunMaker) -> None:
    maker.facts["sampling.json"].update(prompts=None, guidance_scale=None)
    maker.facts["evaluation.json"]["guidance_scale"] = None
    for entry in maker.facts["evaluation.json"]["shown"]:
        entry["prompt"] = None
    page = _page(maker.calibration().width("w4a8"))
    assert page.all("figcaption")[0].text == "seed 1000"
    assert page.all("img")[1].attributes["alt"] == "seed 1000 quantized to W4A8"
    assert "prompts" not in _facts(page)
    assert "guidance" not in _facts(page)


def test_several_bit_widths_are_compared_the_widest_first(maker: RunMaker) -> None:
    maker.calibration().width("w4a8")
    maker.recipe = "rtn"
    maker.facts["export.json"]["size_mib"].update(unet=3.25, ratio=4.0)
    page = _page(maker.width("w8a8"))
    assert "comparison" in _ids(page)
    table = _rows(page, "Bit widths compared")
    assert table["metric"] == ["full precision", "W8A8", "W4A8"]
    assert table["recipe"] == ["", "rtn", "default"]
    assert table["denoiser"] == ["13.00\u00a0MiB", "3.25\u00a0MiB", "2.00\u00a0MiB"]
    assert table["smaller by"] == ["", f"4.00{TIMES}", f"6.50{TIMES}"]
    assert table["Fréchet distance"] == ["1.125", "1.375", "1.375"]


def test_full_precision_is_compared_only_where_all_compared_with_it(maker: RunMaker) -> None:
    maker.calibration().width("w4a8")
    maker.facts["evaluation.json"]["full_precision"]["frechet_distance"]["value"] = 1.0
    table = _rows(_page(maker.width("w8a8")), "Bit widths compared")
    assert table["Fréchet distance"] == ["", "1.375", "1.375"]


def test_only_the_named_bit_widths_are_shown_in_their_order(maker: RunMaker) -> None:
    maker.calibration().width("w8a8").width("w4a8").width("w4a4")
    assert _page(maker, ["w4a4", "w8a8", "w4a4"]).all("h1")[0].text == "tiny-model → W4A4, W8A8"
    assert _page(maker).all("h1")[0].text == "tiny-model → W8A8, W4A8, W4A4"


def test_missing_stages_are_named_with_their_commands(maker: RunMaker) -> None:
    page = _page(maker.calibration())
    notices = [notice.text for notice in page.all("p", class_="missing")]
    assert [notice.partition("Next: ")[2] for notice in notices] == [
        "edadm reconstruct --bits w4a8", "edadm export --bits w4a8", "edadm evaluate --bits w4a8",
    ]  # fmt: skip
    assert _ids(page) == ["model", "selection", "reconstruction", "export", "quality", "provenance"]
    maker.make("reconstruct", "w6a6")
    notices = [notice.all("code")[0].text for notice in _page(maker).all("p", class_="missing")]
    assert notices == ["edadm export --bits w6a6", "edadm evaluate --bits w6a6"]


@pytest.mark.parametrize("kind", ["collect", "select"])
def test_a_calibration_that_was_removed_leaves_the_rest(maker: RunMaker, kind: str) -> None:
    maker.calibration().width("w4a8")
    shutil.rmtree(maker.run.path(kind))
    page = _page(maker)
    assert len(page.all("p", class_="missing")) == 1
    assert len(page.all("div", class_="card")) == 5


def test_collect_alone_is_enough(maker: RunMaker) -> None:
    maker.make("collect")
    page = _page(maker)
    assert page.all("p", class_="missing")[0].all("code")[0].text == "edadm select"


def test_a_recipe_that_learns_nothing_has_no_losses(maker: RunMaker) -> None:
    for unit in maker.facts["units.json"]["units"]:
        unit.update(loss_before=None, loss_after=None, curve=[])
    maker.facts["units.json"]["loss"] = {"first": None, "last": None}
    page = _page(maker.calibration().width("w4a8"))
    assert "learns nothing" in page.text
    assert "loss before" not in _facts(page)


def test_an_evaluation_without_any_metric_still_has_its_distances(maker: RunMaker) -> None:
    maker.facts["evaluation.json"].update(metrics={}, full_precision={}, real=None)
    quality = _rows(_page(maker.calibration().width("w4a8")), "Quality of W4A8")
    assert quality["PSNR to full precision↑ higher is better"] == ["", "31.25\u00a0dB", "pixels", "80"]
    assert len(quality) == 3


def test_commands_give_the_settings_and_exist(maker: RunMaker, capsys: pytest.CaptureFixture[str]) -> None:
    maker.facts["export.json"]["lora"] = [{"file": "style.safetensors", "sha256": "0" * 64, "weight": 0.8}]
    (block,) = _page(maker.calibration().width("w4a8")).all("pre")
    lines = block.text.splitlines()
    assert "edadm export --bits w4a8 --lora style.safetensors:0.8 --parity-samples 2" in lines
    assert lines[1] == (
        "edadm collect --model tiny-model --num-trajectories 3 --num-steps 4 --guidance-scale 2.5 --dtype float32"
    )
    assert lines[3] == "edadm reconstruct --bits w4a8 --recipe default --batch-size 64"
    for line in lines[1:]:
        words = line.split()
        assert main([words[1], "--help"]) == 0
        known = capsys.readouterr().out
        assert all(word in known for word in words if word.startswith("--"))


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("select", {"density_radius": None, "density_quantile": 0.1}, "--density-quantile 0.1"),
        ("select", {"density_radius": None}, "--density-quantile 0.5"),  # as version 0.1 wrote it
        ("select", {"density_radius": 0.123456789}, "--density-radius 0.123456789"),
        ("reconstruct", {"units": ["mid.*", "{a,b}"]}, "--units 'mid.*' --units '{a,b}'"),
        ("reconstruct", {"matmul": "float32"}, "--matmul float32"),
        ("evaluate", _CLIP, "--metrics fid,kid --clip-model ViT-B-32"),
    ],
)
def test_commands_leave_out_no_setting(
    maker: RunMaker, monkeypatch: pytest.MonkeyPatch, kind: str, settings: dict[str, Any], words: str
) -> None:
    monkeypatch.setitem(CONFIGS, kind, {**CONFIGS[kind], **settings})
    (block,) = _page(maker.calibration().width("w4a8")).all("pre")
    (line,) = [line for line in block.text.splitlines() if line.startswith(f"edadm {kind} ")]
    assert words in line
    assert "0" * 64 not in line, "a hash stands for a file, whose name only the user knows"


def test_an_empty_run_is_an_error_with_the_next_command(maker: RunMaker) -> None:
    with pytest.raises(InputError) as caught:
        stage.run(maker.run)
    assert "edadm collect" in str(caught.value.hint)
    assert not maker.run.root.exists()


def test_a_bit_width_that_is_not_there_is_an_error(maker: RunMaker) -> None:
    maker.calibration().width("w4a8")
    with pytest.raises(InputError) as caught:
        stage.run(maker.run, ["w8a8"])
    assert "edadm reconstruct --bits w8a8" in str(caught.value.hint)
    assert not (maker.run.root / "report.html").exists()


def test_nothing_is_shown_of_a_damaged_artifact(maker: RunMaker) -> None:
    page = stage.run(maker.calibration().width("w4a8").run)
    before = page.read_bytes()
    image = maker.run.path("evaluate", "w4a8") / "images" / "0-full.png"
    image.write_bytes(b"\x00" * image.stat().st_size)
    with pytest.raises(InputError, match="changed after it was written"):
        stage.run(maker.run)
    assert page.read_bytes() == before


def test_nothing_is_shown_of_an_artifact_whose_parent_changed(maker: RunMaker) -> None:
    maker.calibration().width("w4a8")
    maker.model = maker.model.model_copy(update={"fingerprint": "e" * 64})
    maker.make("collect")
    with pytest.raises(InputError, match="made from another"):
        stage.run(maker.run)
