"""Evaluations on engines and with step caches: each is on the page under its own name, beside the plain one."""

from __future__ import annotations

from typing import Any

from edadm_cli.artifacts import BuildSpec, save_json
from edadm_cli.report import stage
from tests.unit.report.parsing import Element, parse
from tests.unit.report.runs import CONFIGS, RunMaker, png


def _evaluate(maker: RunMaker, name: str, frechet: float, **settings: Any) -> None:
    """Writes an evaluation of w4a8 with settings that its name shows."""
    facts = dict(maker.facts["evaluation.json"])
    facts["metrics"] = {"frechet_distance": {"value": frechet, "features": "digits/pooled", "num_images": 80}}
    spec = BuildSpec(
        "evaluate", name, {**CONFIGS["evaluate"], **settings}, 0, (maker.run.open("export", "w4a8"),), maker.model
    )
    with maker.run.build(spec) as build:
        save_json(build.path / "evaluation.json", facts)
        for entry in facts["shown"]:
            for kind in ("full_precision", "quantized"):
                (build.path / entry[kind]).parent.mkdir(exist_ok=True)
                (build.path / entry[kind]).write_bytes(png(0))
        build.commit()


def _page(maker: RunMaker) -> Element:
    return parse(stage.run(maker.run).read_text(encoding="utf-8"))


def _frechet(page: Element, label: str) -> str:
    (frame,) = page.all("div", role="region", **{"aria-label": label})
    (row,) = [row.row() for row in frame.all("tr") if row.row()[0].startswith("Fr")]
    return row[2]


def test_an_engine_and_a_step_cache_have_sections_and_commands_of_their_own(maker: RunMaker) -> None:
    maker.calibration().width("w4a8")
    _evaluate(maker, "w4a8-openvino", 2.5, engine="openvino")
    _evaluate(maker, "w4a8-taylorseer-2", 3.5, cache="taylorseer:2")
    page = _page(maker)
    assert _frechet(page, "Quality of W4A8") == "1.375"
    assert _frechet(page, "Quality of W4A8 on the engine openvino") == "2.500"
    assert _frechet(page, "Quality of W4A8 with the step cache taylorseer:2") == "3.500"
    commands = next(code.text for code in page.all("code") if "edadm collect" in code.text).splitlines()
    assert any(line.startswith("edadm evaluate --bits w4a8 --engine openvino ") for line in commands)
    assert any(line.startswith("edadm evaluate --bits w4a8 --cache taylorseer:2 ") for line in commands)


def test_without_a_plain_evaluation_those_on_engines_are_shown(maker: RunMaker) -> None:
    maker.calibration().make("reconstruct", "w4a8")
    maker.make("export", "w4a8")
    _evaluate(maker, "w4a8-openvino", 2.5, engine="openvino")
    page = _page(maker)
    assert _frechet(page, "Quality of W4A8 on the engine openvino") == "2.500"
    assert [p.text for p in page.all("p", class_="missing")] == [
        "The images have not been evaluated. Next: edadm evaluate --bits w4a8"
    ]


def test_an_evaluation_of_an_earlier_export_is_named_and_not_shown(maker: RunMaker) -> None:
    maker.calibration().width("w4a8")
    _evaluate(maker, "w4a8-openvino", 2.5, engine="openvino")
    maker.recipe = "thorough"
    maker.width("w4a8")
    page = _page(maker)
    assert not page.all("div", role="region", **{"aria-label": "Quality of W4A8 on the engine openvino"})
    assert any("was made from another 'export' artifact w4a8" in p.text for p in page.all("p", class_="caution"))
