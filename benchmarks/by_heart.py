"""Measure how much better a quantized denoiser is on the trajectories that it has learned from than on others.

    edadm collect --model digits-sd && edadm select && edadm reconstruct --bits w4a8
    python benchmarks/by_heart.py --run runs/digits-sd --bits w4a8 --device cpu --out docs/data/by-heart.jsonl
    python benchmarks/by_heart.py --rows docs/data/by-heart.jsonl

For some sampler steps it prints the relative L2 error of one prediction, with the inputs that the sampler has in full
precision, on trajectories with the prompts of the collection and other noise, and the ratio of its square to that on
the trajectories of the collection themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from study.rows_of_run import load_widths, print_table, rows_parser

_COLUMNS = 7


def measure(run: Path, bits: Sequence[str], images: int, device: str) -> list[dict[str, Any]]:
    """Returns a row per bit width."""
    from study.learner_judge import one_step_errors

    from edadm_cli.artifacts import RunFolder
    from edadm_cli.models.collected import CollectedRun
    from edadm_cli.models.pipeline_calls.sampling import sample
    from edadm_cli.models.pipeline_calls.seeds import EVALUATION, image_seed

    sampling, rows = CollectedRun.open(RunFolder(run)).sampling, []
    for width in bits:
        models = load_widths(run, ("", width), device)
        learned = list(sampling.seeds[:images])
        noises = {"learned": learned, "other": [image_seed(0, number, EVALUATION) for number in range(len(learned))]}
        row: dict[str, Any] = {"model": sampling.model.id, "bits": width, "trajectories": len(sampling.seeds)}
        for name, seeds in noises.items():
            with one_step_errors(models[""], models[width].denoiser, [], sampling.guidance_scale) as errors:
                sample(
                    models[""],
                    seeds=seeds,
                    prompts=None if sampling.prompts is None else sampling.prompts[: len(seeds)],
                    num_steps=sampling.num_steps,
                    guidance_scale=sampling.guidance_scale,
                )
            row[name] = errors.summary()["one_step_by_step"]
        rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns a Markdown table with two lines per row, and a column for some steps from the first to the last."""
    steps = len(rows[0]["learned"])
    shown = [round(number * (steps - 1) / (_COLUMNS - 1)) for number in range(_COLUMNS)]
    titles = ["model", "trajectories", "", *(f"step {step + 1}" for step in shown)]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        learned, other = ([row[name][step] for step in shown] for name in ("learned", "other"))
        start = f"| `{row['model']}` | {row['trajectories']:,} |"
        lines.append(f"{start} error on other noise | {' | '.join(f'{value:.4f}' for value in other)} |")
        ratios = [(new / old) ** 2 for old, new in zip(learned, other, strict=True)]
        lines.append(f"{start} ratio of squares | {' | '.join(f'{value:.2f}' for value in ratios)} |")
    return "\n".join(lines)


def main() -> None:
    """Reads the command line and prints the table."""
    options = rows_parser(__doc__, bits="w4a8", images=96).parse_args()
    print_table(options, lambda: measure(options.run, options.bits.split(","), options.images, options.device), table)


if __name__ == "__main__":
    main()
