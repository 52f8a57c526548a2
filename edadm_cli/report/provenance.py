"""The section on the origin of the results: lineage, settings, versions and commands."""

from __future__ import annotations

from edadm_cli.artifacts import Payload
from edadm_cli.report.commands import repeating_commands
from edadm_cli.report.contents import Part, RunContents
from edadm_cli.report.formats import flat, plain
from edadm_cli.report.html import Html, Node, code, details, element, escape, section, table

_SHORT = 12
_NO_VERSION = "device"


def provenance_section(contents: RunContents) -> Html:
    """Returns the section with the artifacts' lineage, settings and versions, and the commands to build them again."""
    lead = "An identity is a hash of everything that decides an artifact: settings, seed, parents, the model's files."
    header = ["artifact", "identity", "made from", "seed", "device", "made"]
    lineage = table(header, [_lineage(part) for part in contents.parts()], "Lineage")
    settings = [element("div", element("h4", _title(part)), _settings(part)) for part in contents.parts()]
    return section(
        "provenance",
        "Provenance",
        element("p", lead, class_="lead"),
        lineage,
        element("h3", "Commands to repeat"),
        _commands(contents),
        element("h3", "Details"),
        details("Settings of every stage", settings),
        details("Versions", _versions(contents)),
        details("Identities and fingerprint in full", _identities(contents)),
    )


def _title(part: Part[Payload]) -> str:
    kind, folder = part.artifact.kind, part.artifact.path.name
    return kind if folder == kind else f"{kind} {folder.upper()}"


def _lineage(part: Part[Payload]) -> list[Node]:
    manifest = part.artifact.manifest
    parents = [f"{parent.kind} {parent.identity[:_SHORT]}" for parent in manifest.parents]
    return [
        _title(part),
        code(manifest.identity[:_SHORT]),
        code(", ".join(parents)) if parents else "the model",
        str(manifest.seed),
        plain(manifest.environment.get("device")),
        manifest.created_at.strftime("%Y-%m-%d\u00a0%H:%M\u00a0UTC"),
    ]


def _commands(contents: RunContents) -> Html:
    lines = ["export EDADM_RUN=my-run  # any folder", *repeating_commands(contents)]
    text = "\n".join(lines)
    block = element("pre", element("code", text), class_="scroll", role="region", aria_label="Commands", tabindex=0)
    note = (
        "What came from files of your own (prompts, real images, weights of feature extractors, recipes) is not "
        "in these lines: name the same files again. Equal identities say that it worked."
    )
    return Html(block + element("p", note))


def _settings(part: Part[Payload]) -> Html:
    rows: list[list[Node]] = [[code(name), _breakable(plain(value))] for name, value in flat(part.config)]
    return table(["setting", "value"], rows, f"Settings of {_title(part)}")


def _versions(contents: RunContents) -> Html:
    """Returns one line per program, with several versions if stages were run with different ones."""
    versions_of: dict[str, list[str]] = {}
    for part in contents.parts():
        manifest = part.artifact.manifest
        facts = {manifest.tool.name: manifest.tool.version, **manifest.environment}
        for name, version in facts.items():
            if name != _NO_VERSION and isinstance(version, str) and version not in versions_of.setdefault(name, []):
                versions_of[name].append(version)
    rows = [(name, ", ".join(versions)) for name, versions in versions_of.items()]
    return table(["", "version"], rows, "Versions")


def _identities(contents: RunContents) -> Html:
    rows: list[tuple[Node, Node]] = [(_title(part), code(part.artifact.identity)) for part in contents.parts()]
    rows.append(("model fingerprint", code(contents.model.fingerprint)))
    return table(["", "sha256"], rows, "Identities")


def _breakable(text: str) -> Html:
    return element("span", escape(text), class_="breakable")
