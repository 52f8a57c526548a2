"""Builds the whole page."""

from __future__ import annotations

from importlib.resources import files

from edadm_cli.report.calibration import model_section, selection_section
from edadm_cli.report.contents import RunContents
from edadm_cli.report.headline import cards, comparison, headline
from edadm_cli.report.html import Html, element
from edadm_cli.report.provenance import provenance_section
from edadm_cli.report.quality import images_section, quality_section
from edadm_cli.report.quantization import export_section, reconstruction_section
from edadm_cli.report.sensitivity import sensitivity_section
from edadm_cli.report.speed import speed_section

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_FOOTER = (
    "Written by edadm report. Every number is read from the run's artifacts. "
    "Commands work in the run that was used last; --run names another."
)
_LINKS = {
    "images": "Images",
    "quality": "Quality",
    "comparison": "Comparison",
    "model": "Model",
    "selection": "Calibration",
    "sensitivity": "Sensitivity",
    "reconstruction": "Reconstruction",
    "export": "Size",
    "speed": "Speed",
    "provenance": "Provenance",
}


def render(contents: RunContents) -> str:
    """Builds the page.

    Args:
        contents: The contents of the run.

    Returns:
        A self-contained document: images and styles are embedded, and there are no scripts or external links.
    """
    quality = quality_section(contents)
    evaluated = any(width.evaluate or width.further for width in contents.widths)
    sections = {
        "figures": cards(contents),
        "images": images_section(contents),
        "comparison": comparison(contents),
        **({"quality": quality} if evaluated else {}),
        "model": model_section(contents),
        "selection": selection_section(contents),
        "sensitivity": sensitivity_section(contents),
        "reconstruction": reconstruction_section(contents),
        "export": export_section(contents),
        "speed": speed_section(contents),
        **({} if evaluated else {"quality": quality}),
        "provenance": provenance_section(contents),
    }
    links = [element("a", _LINKS[name], href=f"#{name}") for name in sections if name in _LINKS and sections[name]]
    body = element(
        "body",
        headline(contents),
        element("nav", links, aria_label="Sections"),
        element("main", list(sections.values())),
        element("footer", element("p", _FOOTER)),
    )
    return f"<!doctype html>\n{element('html', _head(contents), body, lang='en')}\n"


def _head(contents: RunContents) -> Html:
    style = files("edadm_cli.report").joinpath("style.css").read_text(encoding="utf-8")
    widths = ", ".join(width.title for width in contents.widths)
    title = f"{contents.name}: {widths}" if widths else contents.name
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("title", f"{title} \u2013 edadm"),
        element("style", Html(style)),
    )
