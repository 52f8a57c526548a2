"""The model card of an export: a README.md with the metadata that the Hugging Face hub reads.

The card says how the export was made and how good it is. It says nothing about the machine that made it: no path, host
or time. Text that a user typed is escaped, so that it cannot become markup.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edadm_cli.artifacts import Artifact, Evaluation, ExportFacts, RunFolder, Selection, TextEncoder, Units, recipe_name
from edadm_cli.bits import BitWidth
from edadm_cli.export.usage import PipelineUse
from edadm_cli.metrics.registry import in_order, label_of
from edadm_cli.models.collected import Sampling
from edadm_cli.models.pipeline_calls.images import has_images
from edadm_cli.models.sources.hub import looks_like_hub_id

CARD_FILE = "README.md"
GRID_FILE = "grid.png"
HERE = "PATH/OF/THIS/FOLDER"
_SPECIAL = re.compile(
    r"[\\`*_{}\[\]#|<>~$@]"  # markup wherever it is
    r"|&(?=[#\w])|:(?=\S)|(?<=www)\."  # entities, addresses, short names of emoji
    r"|^[+\-=]"  # lists and rules, at the start of a line
)
_ITEM = re.compile(r"^(\d+)([.)])(?=\s|$)")


@dataclass(frozen=True)
class CardFacts:
    """The content of a card.

    Attributes:
        bits: The bit width, such as `w4a8`.
        recipe: Name of the recipe.
        base: Name of the model that was quantized; `None` for one without a public name.
        base_repository: Its repository on the hub; `None` for a model from elsewhere.
        use: What the pipeline generates, and from what.
        units: The record of the reconstruction.
        selection: The record of the calibration set.
        num_steps: Number of sampler steps of the calibration trajectories.
        export: Sizes and parity of the export.
        evaluation: Metrics; `None` before `edadm evaluate`.
    """

    bits: str
    recipe: str
    base: str | None
    base_repository: str | None
    use: PipelineUse
    units: Units
    selection: Selection
    num_steps: int
    export: ExportFacts
    evaluation: Evaluation | None

    @classmethod
    def of_run(
        cls,
        run: RunFolder,
        source: Artifact,
        folder: Path,
        export: ExportFacts,
        evaluation: Evaluation | None = None,
    ) -> CardFacts:
        """Reads the facts of a run.

        Args:
            run: The run.
            source: The reconstruction that the export was made from.
            folder: The exported pipeline.
            export: The record of the export.
            evaluation: The metrics of the export; `None` if there are none.
        """
        collect = run.open("collect")
        sampling = Sampling.load(collect)
        entry, model = sampling.entry, collect.manifest.model.id
        is_on_hub = entry.source == "hub"
        repository = entry.location if is_on_hub and looks_like_hub_id(entry.location) else None
        is_named = is_on_hub or entry.source in ("shipped", "random", "compvis", "assembled")
        return cls(
            bits=source.path.name,
            recipe=recipe_name(source),
            base=model if is_named else None,
            base_repository=repository,
            use=PipelineUse.of_folder(folder, sampling.prompts is not None, has_images(entry)),
            units=Units.load(source),
            selection=Selection.load(run.open("select")),
            num_steps=sampling.num_steps,
            export=export,
            evaluation=evaluation,
        )


def model_card(facts: CardFacts, place: str = HERE, base_license: str | None = None, has_grid: bool = False) -> str:
    """Returns the text of a model card.

    Args:
        facts: The content of the card.
        place: The argument of `from_pretrained` in the card: a repository, or a placeholder for a folder.
        base_license: Licence of the base model, as the hub names it; `None` where it is not known.
        has_grid: Whether there is an image grid beside the card.
    """
    base = escape(facts.base) if facts.base else "a diffusion pipeline"
    title = f"{base}, {facts.bits.upper()}" if facts.base else f"A diffusion pipeline in {facts.bits.upper()}"
    parts = [
        _metadata(facts, base_license),
        f"# {title}",
        f"The denoiser of {base} in {facts.bits.upper()} ({_bits(facts.bits)}), quantized after training with"
        f" [EDA-DM](https://arxiv.org/abs/2401.04585) by `edadm`. {_rest(facts)}",
        "## Use",
        _usage(facts, place),
        "## How it was made",
        _table(("", ""), list(_how_it_was_made(facts))),
    ]
    if facts.evaluation is not None:
        parts += ["## Quality", _quality(facts.evaluation)]
        if has_grid:
            parts.append(f"![Full precision above, {facts.bits.upper()} below, with the same seeds]({GRID_FILE})")
    licence = f"The licence of the base model applies: {escape(base_license)}." if base_license else None
    parts += ["## Licence", licence or "The licence of the base model applies; it is not repeated here."]
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """Returns Markdown that shows a text unchanged, on one line."""
    line = " ".join(text.split())
    line = "".join(char for char in line if char.isprintable())
    return _ITEM.sub(r"\1\\\2", _SPECIAL.sub(lambda match: f"\\{match[0]}", line))


def _metadata(facts: CardFacts, base_license: str | None) -> str:
    """Returns the YAML block that the hub reads; its strings are written as JSON, which is valid YAML."""
    fields: dict[str, object] = {
        "library_name": "diffusers",
        "pipeline_tag": facts.use.tag(),
    }
    if facts.base_repository is not None:
        fields |= {"base_model": facts.base_repository, "base_model_relation": "quantized"}
    if base_license is not None:
        fields["license"] = base_license
    fields["tags"] = ["edadm", "quantized", facts.bits]
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in fields.items()), "---"])


def _usage(facts: CardFacts, place: str) -> str:
    packages = f"edadm diffusers{' torchao' if facts.export.text_encoders else ''}"
    return f"`pip install {packages}`, then\n\n```python\n{facts.use.code(place)}\n```"


def _how_it_was_made(facts: CardFacts) -> Iterator[tuple[str, str]]:
    """Yields the rows of the table that says how the export was made: a name and a value in Markdown."""
    coverage, sizes, selection = facts.units.coverage, facts.export.size_mib, facts.selection
    yield "bits", _bits(facts.bits)
    yield "recipe", escape(facts.recipe)
    yield (
        "calibration",
        f"{selection.num_samples:,} samples of {selection.num_trajectories:,} trajectories with {facts.num_steps}"
        f" steps, strategy {selection.strategy}",
    )
    if facts.export.lora:
        yield "fused LoRA", ", ".join(f"{escape(lora.file)} at weight {lora.weight:g}" for lora in facts.export.lora)
    yield (
        "quantized layers",
        f"{coverage.quantized:,} of {coverage.planned:,} planned; {coverage.kept:,} are left in floating point",
    )
    yield (
        "denoiser on disk",
        f"{facts.export.denoiser_mib:,.1f} MiB; {sizes['denoiser_fp32']:,.1f} MiB in float32"
        f" ({sizes['ratio']:.2f} times smaller)",
    )
    for name, encoder in facts.export.text_encoders.items():
        yield escape(name), _encoder(encoder)
    whole = facts.export.pipeline
    if whole is None:
        disk = sum(size for name, size in sizes.items() if name not in ("denoiser_fp32", "ratio"))
        yield "pipeline on disk", f"{disk:,.1f} MiB"
        return
    yield "pipeline on disk", f"{whole.disk_mib:,.1f} MiB; {whole.disk_before_mib:,.1f} MiB with {_before(facts)}"
    yield (
        "pipeline in memory",
        f"{whole.memory_mib:,.1f} MiB of weights loaded in float16; {whole.memory_before_mib:,.1f} MiB at full"
        " precision",
    )


def _before(facts: CardFacts) -> str:
    return "the denoiser in float32" + (" and text encoders in floating point" if facts.export.text_encoders else "")


def _encoder(encoder: TextEncoder) -> str:
    """Returns what was done to a text encoder, and how much its states changed."""
    text = (
        f"{encoder.bits}-bit weights in {encoder.layers:,} linear layers, {encoder.size_mib:,.1f} MiB instead of"
        f" {encoder.float_mib:,.1f}"
    )
    if encoder.cosine is None or encoder.rel_l2 is None:
        return text
    return f"{text}; states at a cosine of {encoder.cosine:.6f} and a relative L2 distance of {encoder.rel_l2:.2g}"


def _rest(facts: CardFacts) -> str:
    encoders = facts.export.text_encoders
    if not encoders:
        return "The rest of the pipeline is unchanged."
    return "The text encoders have weights of 8 bits, rounded to nearest by torchao. The rest is unchanged."


def _quality(evaluation: Evaluation) -> str:
    """Returns the table of the metrics, and the sentences of the verdict below it."""
    rows = []
    for name in in_order(evaluation.metrics):
        metric, full = evaluation.metrics[name], evaluation.full_precision.get(name)
        before = "" if full is None else f"{full.value:.4g}"
        rows.append((label_of(name), before, f"{metric.value:.4g}", metric.features, f"{metric.num_images:,}"))
    distance = evaluation.distance_to_full_precision.model_dump(exclude_none=True)
    for name in in_order(distance):
        count = evaluation.num_images
        if "one_step" in name and evaluation.one_step is not None:
            count = evaluation.one_step.num_images
        rows.append((f"{label_of(name)} to full precision", "", f"{distance[name]:.4g}", "", f"{count:,}"))
    header = ("metric", "full precision", evaluation.bits.upper(), "features", "images")
    sentences = "".join(f"\n\n{escape(text)}" for text in evaluation.verdict)
    return _table(header, [tuple(map(escape, row)) for row in rows]) + sentences


def _bits(bits: str) -> str:
    width = BitWidth.parse(bits)
    if width.size_mib is not None:
        weights = f"weights of several widths, with which the denoiser takes at most {width.size_mib:g} MiB"
    elif width.average is not None:
        weights = f"{width.average:g}-bit weights on average"
    else:
        weights = f"{width.weight}-bit weights"
        if width.group_size is not None:
            weights += f" in groups of {width.group_size}"
    return f"{weights}, {width.activation}-bit activations"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
