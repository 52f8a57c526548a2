"""The pieces of the page: markup, numbers, plots."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from edadm_cli.metrics.registry import in_order
from edadm_cli.report.formats import MINUS, NOTHING, count, flat, mebibytes, number, percentage, plain
from edadm_cli.report.html import Html, element, escape, table
from edadm_cli.report.plots import counts_plot, curve_plot, decades, linear_ticks, loss_plot, score_plot

TIMES = "\u00d7"


def _draw(svg: Html) -> ElementTree.Element:
    """Parses a plot as XML and checks that every point is inside the picture."""
    root = ElementTree.fromstring(svg)
    left, top, width, height = (float(part) for part in root.attrib["viewBox"].split())
    for node in root.iter():
        for across in ("x", "x1", "x2", "cx"):
            assert left <= float(node.get(across, left)) <= left + width
        for down in ("y", "y1", "y2", "cy"):
            assert top <= float(node.get(down, top)) <= top + height
        for point in node.get("points", "").split():
            x, y = (float(part) for part in point.split(","))
            assert left <= x <= left + width
            assert top <= y <= top + height
        assert float(node.get("height", 0)) >= 0
    return root


def test_text_is_escaped_and_markup_is_not() -> None:
    assert element("p", "<b>", Html("<i></i>"), None, ["&", ["'"]]) == "<p>&lt;b&gt;<i></i>&amp;&#x27;</p>"
    assert escape("a\x00b\x1b\ud800") == "a\ufffdb\ufffd\ufffd"
    assert escape("tab\tline\n") == "tab\tline\n"


def test_attributes_are_escaped_renamed_and_left_out() -> None:
    built = element(
        "img", alt='"><script>', class_="a", aria_label="b", hidden=True, title=None, lang=False, tabindex=0
    )
    assert built == ('<img alt="&quot;&gt;&lt;script&gt;" class="a" aria-label="b" hidden tabindex="0">')


def test_a_table_refuses_rows_of_another_length() -> None:
    with pytest.raises(ValueError, match="zip"):
        table(["a", "b"], [["only one"]], "label")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, NOTHING),
        (0.0, "0"),
        (0, "0"),
        (12345, "12,345"),
        (0.06402793, "0.06403"),
        (35.388, "35.39"),
        (-0.019361, f"{MINUS}0.01936"),
        (1234.5, "1,234"),
        (2.17e-07, f"2.17 {TIMES} 10⁻⁷"),
        (-3.5e12, f"{MINUS}3.50 {TIMES} 10¹²"),
        (9.996e-05, f"1.00 {TIMES} 10⁻⁴"),
    ],
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


def test_other_figures() -> None:
    assert percentage(0.9988) == "99.88\u00a0%"
    assert mebibytes(1.673) == "1.67\u00a0MiB"
    assert mebibytes(0.000333786) == "0.34\u00a0KiB"
    assert count(1, "layer") == "1 layer"
    assert count(1200, "layer") == "1,200 layers"
    assert [plain(value) for value in (None, True, 0.5, [1, 2], "x")] == [NOTHING, "yes", "0.5", "1, 2", "x"]
    assert in_order(["zeta", "prompt_accuracy", "fid"]) == ["fid", "prompt_accuracy", "zeta"]


def test_settings_are_flattened_with_nothing_lost() -> None:
    nested = {"a": {"b": 1, "c": {}}, "d": [{"e": 2}, {"e": 3}], "f": [4]}
    assert flat(nested) == [("a.b", 1), ("a.c", None), ("d.0.e", 2), ("d.1.e", 3), ("f", [4])]


@pytest.mark.parametrize("largest", [1, 2, 3, 7, 12, 14, 99, 100, 101, 5120])
def test_ticks_are_round_few_and_enough(largest: int) -> None:
    ticks = linear_ticks(largest)
    assert ticks[0] == 0
    assert ticks[-1] >= largest > ticks[-2]
    assert 2 <= len(ticks) <= 7
    assert all(tick == int(tick) for tick in ticks)


@pytest.mark.parametrize("values", [[1.0], [0.0], [1e-9, 1e3], [0.5, 0.0, -1.0], [10.0, 100.0]])
def test_decades_enclose_what_is_positive(values: list[float]) -> None:
    ticks = decades(values)
    positive = [value for value in values if value > 0]
    assert len(ticks) >= 2
    assert all(ticks[0] <= value <= ticks[-1] for value in positive)


@pytest.mark.parametrize("num_steps", [1, 2, 21, 250])
def test_the_selection_plots_show_every_step(num_steps: int) -> None:
    timesteps = list(range(num_steps * 4, 0, -4))
    scores = [index / num_steps for index in range(num_steps)]
    counts = [index % 5 for index in range(num_steps)]
    bars = [node for node in _draw(counts_plot(timesteps, counts)).iter("rect")]
    assert len(bars) == num_steps
    heights = [float(bar.attrib["height"]) for bar in bars]
    assert [height == 0 for height in heights] == [count == 0 for count in counts]
    lines = list(_draw(score_plot(timesteps, scores, scores[::-1])).iter("polyline"))
    assert [len(line.attrib["points"].split()) for line in lines] == [num_steps, num_steps]


@pytest.mark.parametrize("num_units", [1, 36, 400])
def test_the_loss_plot_has_two_marks_a_unit_the_smaller_loss_lower(num_units: int) -> None:
    before = [10.0 ** (index % 7 - 4) for index in range(num_units)]
    root = _draw(loss_plot([f"unit <{i}>" for i in range(num_units)], before, [value / 3 for value in before]))
    marks = [group for group in root.iter("g") if group.find("title") is not None]
    assert len(marks) == num_units
    for mark in marks:
        hollow, solid = mark.findall("circle")
        assert float(hollow.attrib["cy"]) < float(solid.attrib["cy"])


@pytest.mark.parametrize("values", [[1.0, 1.0], [5.0, 0.0, 1e-6], [0.0, 0.0], list(range(1, 51))])
def test_curves_stay_in_their_picture(values: list[float]) -> None:
    (line,) = _draw(curve_plot(values, "a curve")).iter("polyline")
    assert len(line.attrib["points"].split()) == len(values)


def test_plots_take_their_colours_from_the_page() -> None:
    drawn = score_plot([2, 1], [0, 1], [1, 0]) + counts_plot([2, 1], [3, 4]) + loss_plot(["a"], [2.0], [1.0])
    assert re.search(r"(fill|stroke|style|color)=", drawn) is None
