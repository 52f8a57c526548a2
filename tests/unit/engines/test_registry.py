"""The list of engines: what each can do here, and why it is refused."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from edadm_cli import plugins
from edadm_cli.engines import registry
from edadm_cli.engines.base import Engine, LayerExecution
from edadm_cli.errors import MachineError, UsageError


def test_every_engine_is_one_and_has_the_name_it_is_listed_under() -> None:
    for name in registry.ENGINE_NAMES:
        engine = registry.engine(name)
        assert isinstance(engine, Engine)
        assert engine.name == name
        assert engine.description
        assert 0 <= engine.layer_bound < 0.1


def test_each_device_has_an_engine() -> None:
    assert registry.default_engine(torch.device("cpu")).name == "openvino"
    assert registry.default_engine(torch.device("cuda", 1)).name == "cuda"


def test_an_unknown_engine_is_reported_with_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"no engine 'tensorrt'; there are reference, openvino"):
        registry.engine("tensorrt")


def test_what_is_refused_says_why_and_what_is_not_runs() -> None:
    facts = {actual.name: actual for actual in registry.engine_facts()}
    assert list(facts) == list(registry.ENGINE_NAMES)
    assert facts["openvino"].refusals["cpu"] is None
    assert facts["openvino"].has_files
    assert not facts["reference"].has_files
    assert "cuda" in str(facts["openvino"].refusals["cuda"]).lower()
    for name, actual in facts.items():
        for device, reason in actual.refusals.items():
            if reason is not None:
                with pytest.raises(MachineError) as caught:
                    registry.engine(name).require(torch.device(device))
                assert caught.value.message == reason
                assert caught.value.hint == "edadm engines"


def test_an_engine_without_its_library_is_refused_and_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "an_engine_of_tests.py").write_text("import a_library_that_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry._ENGINES, "openvino", ("an_engine_of_tests", "Engine"))
    with pytest.raises(MachineError, match="needs the package 'a_library_that_nobody_has'"):
        registry.engine("openvino")
    facts = {actual.name: actual for actual in registry.engine_facts()}["openvino"]
    assert facts.layer_bound is None
    assert all("a_library_that_nobody_has" in str(reason) for reason in facts.refusals.values())


def test_an_engine_whose_library_lacks_a_name_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "another_engine_of_tests.py").write_text("import json\njson.a_function_of_another_version\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry._ENGINES, "openvino", ("another_engine_of_tests", "Engine"))
    with pytest.raises(MachineError, match=r"cannot be loaded: .*a_function_of_another_version"):
        registry.engine("openvino")


def test_two_packages_with_an_engine_of_one_name_are_both_named(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint("twin", f"{package}:Twin", registry.GROUP) for package in ("one_package.run", "other_package")]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points if group == registry.GROUP else [])
    with pytest.raises(MachineError, match=r"'twin': one_package \(one_package.run:Twin\) and other_package \("):
        registry.engine("twin")
    facts = {actual.name: actual for actual in registry.engine_facts()}
    assert list(facts) == [*registry.ENGINE_NAMES, "twin"]
    assert "have the name 'twin'" in str(facts["twin"].refusals["cpu"])


@pytest.mark.parametrize(
    ("precision", "is_met"),
    [("int8", True), ("int4", True), ("float8_e4m3fn", True), ("bfloat16", False), ("float32", False), ("none", False)],
)
def test_a_plan_is_met_by_any_element_type_of_eight_bits_or_fewer(precision: str, is_met: bool) -> None:
    assert LayerExecution("a", "linear", "w8a8", precision).is_met == is_met
    assert LayerExecution("a", "linear", "float", precision).is_met
