"""Measure how much of a denoiser's rounding error each sampler carries to the final picture.

    edadm collect --model emoji-sd && edadm select && edadm reconstruct --bits w8a8 && edadm reconstruct --bits w4a8
    python benchmarks/samplers.py --run runs/emoji-sd --bits w8a8,w4a8 --out docs/data/samplers.jsonl
    python benchmarks/samplers.py --rows docs/data/samplers.jsonl

The quantized denoiser is the same in all rows: its ranges and rounding were learned on trajectories of the model's own
sampler. Both precisions sample with the scheduler of the row, from the same noise and prompts, in as many steps.
The scheduler of the pipeline itself comes first.
`final` is the relative L2 distance of the final latents, `top1` the share of the pictures whose name ranks first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from study.rows_of_run import load_widths, print_table, rows_parser

FEWEST_JUDGED = 100  # retrieval of fewer pictures says nothing
SCHEDULERS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "Euler": ("EulerDiscreteScheduler", {}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "DDIM": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "DPM-Solver++, order 2": ("DPMSolverMultistepScheduler", {}),
    "DPM-Solver++, order 3": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "LMS, order 4": ("LMSDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
}
"""By name, the class in diffusers and the settings that are not taken from the pipeline's own scheduler."""


def own_name(scheduler: Any) -> str:
    """Returns the short name of a pipeline's own scheduler, such as `Euler` for `EulerDiscreteScheduler`."""
    return type(scheduler).__name__.removesuffix("Scheduler").removesuffix("Discrete")


def measure(run: Path, bits: Sequence[str], images: int, device: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns a row per scheduler and bit width."""
    import diffusers
    from study.emoji_judge import generate, judge, labels, prompts_of

    from edadm_cli.artifacts import RunFolder
    from edadm_cli.metrics.distances import relative_l2
    from edadm_cli.models.collected import CollectedRun

    collected, models = CollectedRun.open(RunFolder(run)), load_widths(run, ("", *bits), device)
    original = models[""].pipeline.scheduler
    own = own_name(original)
    judged, asked = judge(device), labels(prompts_of(collected, images, 0))
    rows = []
    for name in (own, *(name for name in names if name != own)):
        class_name, changes = (type(original).__name__, {}) if name == own else SCHEDULERS[name]
        kind = getattr(diffusers, class_name)
        exact = None
        for width, model in models.items():
            model.pipeline.scheduler = kind.from_config(original.config, **changes)
            pictures, latents = generate(model, collected, 0, images, images)
            exact = latents if exact is None else exact
            distances = relative_l2(latents, exact)
            label = f"{own}, its own" if name == own else name
            row: dict[str, Any] = {"model": collected.entry.name, "scheduler": label, "bits": width, "images": images}
            row |= {"final": float(distances.mean()), "median": float(distances.median())}
            rows.append(row | judged.metrics(judged.features(pictures), asked))
            print(json.dumps(rows[-1]), flush=True)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns one Markdown table per model: a line per scheduler, with retrieval where pictures are many."""
    lines: list[str] = []
    for model in dict.fromkeys(row["model"] for row in rows):
        cells = {(row["scheduler"], row["bits"]): row for row in rows if row["model"] == model}
        widths = list(dict.fromkeys(bits for _, bits in cells))
        judged = widths if min(row["images"] for row in rows) >= FEWEST_JUDGED else []
        titles = [*(f"final, {bits}" for bits in widths if bits), *(f"top 1, {bits or 'full'}" for bits in judged)]
        lines += ["", f"### {model}", "", f"| scheduler | {' | '.join(titles)} |", "|---|" + "---|" * len(titles)]
        for name in dict.fromkeys(name for name, _ in cells):
            of = {bits: cells[name, bits] for bits in widths}
            values = [f"{of[bits]['final']:.4f}" for bits in widths if bits]
            values += [f"{of[bits]['top1']:.3f}" for bits in judged]
            lines.append(f"| {name} | {' | '.join(values)} |")
    return "\n".join(lines)


def main() -> None:
    """Reads the command line and prints the table."""
    parser = rows_parser(__doc__, bits="w8a8", images=256)
    parser.add_argument("--schedulers", default="", help="names of the table with semicolons; by default all")
    options = parser.parse_args()
    names = [name for name in options.schedulers.split(";") if name] or list(SCHEDULERS)
    arguments = (options.run, options.bits.split(","), options.images, options.device, names)
    print_table(options, lambda: measure(*arguments), table)


if __name__ == "__main__":
    main()
