"""Builds HTML from typed pieces: text is escaped, markup is not.

`element("p", "a < b")` gives `<p>a &lt; b</p>`.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import TypeAlias

_VOID = frozenset({"br", "col", "hr", "img", "link", "meta"})
# Characters that HTML does not allow, such as NUL; a tab and a line break are allowed.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


class Html(str):
    """Text that is markup and is not escaped."""

    __slots__ = ()


Node: TypeAlias = "str | Sequence[Node] | None"
"""A child of an element: markup, text that is escaped, nothing, or several of these."""
Attribute = str | int | float | bool | None


def escape(text: str) -> Html:
    """Escapes text for content and quoted attributes; characters that HTML forbids become U+FFFD."""
    return Html(html.escape(_FORBIDDEN.sub("\ufffd", text), quote=True))


def join(nodes: Iterable[Node]) -> Html:
    """Puts pieces one after the other."""
    return Html("".join(_render(node) for node in nodes))


def element(tag: str, *children: Node, **attributes: Attribute) -> Html:
    """Builds an element.

    Args:
        tag: Its name.
        children: Its content.
        attributes: Its attributes: `class_` for `class`, `aria_label` for `aria-label`. `None` and `False` omit an
            attribute, `True` gives one without a value.
    """
    opening = Html(f"<{tag}{_attributes(attributes)}>")
    return opening if tag in _VOID else Html(f"{opening}{join(children)}</{tag}>")


def table(header: Sequence[Node], rows: Iterable[Sequence[Node]], label: str, numeric: Iterable[int] = ()) -> Html:
    """Builds a table that scrolls inside its own frame; the first cell of a row is the row's header.

    Args:
        header: The columns' names.
        rows: The cells of each row, one per column.
        label: A description for people who cannot see the table.
        numeric: The columns of numbers, which are aligned right.
    """
    classes = ["number" if index in set(numeric) else None for index in range(len(header))]
    head = element("tr", [element("th", cell, scope="col", class_=c) for cell, c in zip(header, classes, strict=True)])
    body = [
        element(
            "tr",
            [
                element("th", cell, scope="row", class_=c) if index == 0 else element("td", cell, class_=c)
                for index, (cell, c) in enumerate(zip(row, classes, strict=True))
            ],
        )
        for row in rows
    ]
    return scroller(element("table", element("thead", head), element("tbody", body)), label)


def scroller(content: Html, label: str) -> Html:
    """Puts wide content into a frame that scrolls instead of the page, also by keyboard."""
    return element("div", content, class_="scroll", role="region", aria_label=label, tabindex=0)


def facts(pairs: Iterable[tuple[Node, Node]]) -> Html:
    """Builds a list of names and values; pairs without a value are left out."""
    shown = [
        element("div", element("dt", name), element("dd", value)) for name, value in pairs if value not in (None, "")
    ]
    return element("dl", shown, class_="facts")


def details(summary: Node, *children: Node) -> Html:
    """Builds a part that readers can open and close."""
    return element("details", element("summary", summary), element("div", *children, class_="inside"))


def section(name: str, title: str, *children: Node) -> Html:
    """Builds a section of the page, with a heading to link to."""
    heading = element("h2", title, id=name)
    return element("section", heading, *children, aria_labelledby=name)


def sentences(texts: Iterable[str]) -> Html | None:
    """Builds a block of short paragraphs, one per text; `None` without any."""
    paragraphs = [element("p", text) for text in texts]
    return element("div", paragraphs, class_="sentences") if paragraphs else None


def code(text: str) -> Html:
    """Builds inline code."""
    return element("code", text)


def _render(node: Node) -> str:
    if node is None:
        return ""
    if isinstance(node, str):
        return node if isinstance(node, Html) else escape(node)
    return join(node)


def _attributes(attributes: dict[str, Attribute]) -> str:
    parts = []
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        name = name.rstrip("_").replace("_", "-")
        parts.append(f" {name}" if value is True else f' {name}="{escape(str(value))}"')
    return "".join(parts)
