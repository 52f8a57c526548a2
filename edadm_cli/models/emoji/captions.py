"""Defines the names, styles and captions of the emoji pictures.

Every picture set has its own style word. A picture's name is a list of words. A caption is a template that is filled
with the name and, in most templates, the style word: `"fluent emoji of woman teacher medium skin tone"`.
"""

from __future__ import annotations

STYLES: dict[str, str] = {
    "noto": "noto",
    "noto-v1": "blob",
    "fluent-emoji": "fluent",
    "fluent-emoji-flat": "flat",
    "twemoji": "twemoji",
    "emojione": "emojitwo",
    "fxemoji": "firefox",
    "streamline-emojis": "streamline",
}
"""Maps each picture set of `@iconify/json` to the word that names its style in captions."""

STYLED_TEMPLATES = (
    "{name}, {style} style",
    "{style} {name}",
    "{style} emoji of {name}",
    "{name} in {style} style",
    "a picture of {name}, {style}",
    "a {style} emoji of {name}",
)
PLAIN_TEMPLATES = ("{name}", "{name} emoji", "an emoji of {name}")
PROMPT_TEMPLATE = STYLED_TEMPLATES[0]
"""The template of the prompts that the shipped models are measured with."""

MAX_TOKENS = 24
"""The length of a tokenized caption: the start token, up to 22 tokens, and the end token."""


def captions_of(name: str, style: str) -> tuple[str, ...]:
    """Returns every caption of a picture: first those that name its style, then those that do not."""
    return tuple(template.format(name=name, style=style) for template in (*STYLED_TEMPLATES, *PLAIN_TEMPLATES))


def prompt_of(name: str, style: str) -> str:
    """Returns the prompt that asks for a name in a style."""
    return PROMPT_TEMPLATE.format(name=name, style=style)
