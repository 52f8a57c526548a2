"""The sections about full precision: the model, how it was sampled, and the selection of calibration samples."""

from __future__ import annotations

from typing import Any

from edadm_cli.artifacts import Selection
from edadm_cli.report.contents import RunContents
from edadm_cli.report.formats import count, flat, number, plain
from edadm_cli.report.html import Html, code, details, element, facts, section, table
from edadm_cli.report.notices import missing
from edadm_cli.report.plots import counts_plot, score_plot


def model_section(contents: RunContents) -> Html:
    """Returns the section about the model and its sampling at full precision."""
    model = contents.model
    pairs: list[tuple[Any, Any]] = [
        ("model", model.id),
        ("revision", model.revision),
        ("fingerprint", code(model.fingerprint[:12])),
    ]
    if contents.collect is None:
        return section("model", "Model and sampling", facts(pairs), missing(contents, "collect"))
    sampling = contents.collect.facts
    scheduler, prompts = sampling.scheduler, sampling.prompts
    pairs += [
        ("denoiser", sampling.entry.denoiser),
        ("scheduler", scheduler.class_name),
        ("sampler steps", str(sampling.num_steps)),
        ("guidance", _optional(sampling.guidance_scale)),
        ("eta", plain(sampling.eta)),
        ("trajectories", f"{len(sampling.seeds):,}"),
        ("prompts", None if prompts is None else f"{len(prompts):,}, {len(set(prompts)):,} of them different"),
        ("arithmetic", sampling.dtype),
        ("seed", str(contents.collect.artifact.manifest.seed)),
    ]
    rows = [(code(name), plain(value)) for name, value in flat(scheduler.config)]
    more = details("Scheduler settings", table(["setting", "value"], rows, "Scheduler settings")) if rows else None
    return section("model", "Model and sampling", facts(pairs), more)


def selection_section(contents: RunContents) -> Html:
    """Returns the section about the steps that the calibration samples come from."""
    if contents.select is None:
        return section("selection", "Calibration set", missing(contents, "select"))
    chosen = contents.select.facts
    timesteps, counts = chosen.timesteps, chosen.counts
    lead = (
        f"{count(chosen.num_samples, 'sample')} from {count(len(counts), 'step')} of "
        f"{chosen.num_trajectories:,} trajectories. {chosen.strategy_description}"
    )
    plots = element(
        "div",
        _figure("Samples per step", counts_plot(timesteps, counts), []),
        _figure("Scores", score_plot(timesteps, chosen.density, chosen.variety), ["density", "variety"]),
        class_="plots",
    )
    pairs = [
        ("strategy", chosen.strategy),
        ("density radius", _radius(chosen)),
        ("variety weight", _optional(chosen.variety_weight)),
        ("fewest and most samples per step", f"{min(counts)} and {max(counts)}"),
        ("seed", str(contents.select.artifact.manifest.seed)),
    ]
    return section("selection", "Calibration set", element("p", lead.strip(), class_="lead"), plots, facts(pairs))


def _figure(title: str, plot: Html, legend: list[str]) -> Html:
    keys = [element("span", name, class_=f"key {name}") for name in legend]
    return element("figure", element("figcaption", element("span", title, class_="title"), keys), plot)


def _radius(chosen: Selection) -> str | None:
    if chosen.density_radius is None:
        return None
    return f"{number(chosen.density_radius)} ({chosen.density_radius_source})"


def _optional(value: float | None) -> str | None:
    return None if value is None else plain(value)
