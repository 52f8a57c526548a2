"""Names, styles and captions of the emoji pictures.

A picture set has a style word of its own, and a picture's name is the list of words that its caption names. A caption
is a template with the name and, in most templates, the style: `"fluent emoji of woman teacher medium skin tone"`.
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
"""Picture set of `@iconify/json` -> the word that names its style in captions."""

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
"""Length of a tokenized caption: the start, up to 22 tokens, and the end."""


def captions_of(name: str, style: str) -> tuple[str, ...]:
    """Returns every caption of a picture: the templates with the style first, then those without."""
    return tuple(template.format(name=name, style=style) for template in (*STYLED_TEMPLATES, *PLAIN_TEMPLATES))


def prompt_of(name: str, style: str) -> str:
    """Returns the prompt that asks for a name in a style."""
    return PROMPT_TEMPLATE.format(name=name, style=style)
