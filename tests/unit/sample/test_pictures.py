"""What an image's file is called, and how another image in its place is described."""

from __future__ import annotations

import pytest

from edadm_cli.sample.pictures import Picture


def _picture(prompt: str | None, **changes: object) -> Picture:
    facts = {"seed": 7, "num_steps": 2, "guidance_scale": None, "arithmetic": "fake-quantize", "export": "e" * 64}
    return Picture(prompt=prompt, **{**facts, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "file"),
    [(None, "000007.png"), ("a handwritten seven", "000007-a-handwritten-seven.png"), ("seven", "000007-seven.png")],
)
def test_a_plain_prompt_stands_in_the_name(prompt: str | None, file: str) -> None:
    assert _picture(prompt).file == file


def test_two_prompts_never_share_a_file() -> None:
    long = "a very long prompt about nothing in particular, " * 3
    prompts = [
        "猫",
        "狗",
        "قطة",
        "🐈",
        "A seven",
        "a seven",
        "a-seven",
        "a  seven",
        "a seven.",
        long,
        f"{long}!",
        "\ud800",
    ]
    names = [_picture(prompt).file for prompt in prompts]
    assert len(set(names)) == len(prompts)
    assert all(name.isascii() and len(name) < 80 and "/" not in name for name in names)


def test_another_image_is_described_by_what_differs() -> None:
    there = _picture("a", export="f" * 64).facts()
    assert (
        _picture("a", num_steps=3, export="f" * 64).differences(there) == "another image: its num steps is 2 and not 3"
    )
    assert "its prompt is 'a' and not 'b'" in _picture("b").differences(there)
    for foreign in (None, "", "[]", "{"):
        assert _picture("a").differences(foreign) == "a file that edadm did not write"
