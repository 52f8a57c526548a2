"""What the recipe `quick` costs in quality, beside `default`, at one bit width, on the models that ship with weights.

    python benchmarks/quick_cost.py --out studies/quick --device cuda
    python benchmarks/quick_cost.py --rows studies/quick/rows.jsonl

A row is `edadm run` of one model with one recipe and one seed. It is added to `OUT/rows.jsonl` when it is done, and the
same command skips the rows that are there, so that a study that was killed goes on. Other options, such as
`--num-steps 4`, go to `edadm run`. `--rows` prints the means over the seeds of the rows at `--bits`, and measures
nothing.

Columns: the number of images; `final`, the relative L2 distance of the final latents to full precision of the same
seed; `one step`, the relative L2 error of single predictions on held-out trajectories (guided, where the model has
guidance); the Fréchet distance to real images, and that of full precision. A row has the seconds of the stages too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

MODELS = ("digits-ddpm", "digits-sd", "emoji-sd", "emoji-dit")
RECIPES = ("default", "quick")
_STAGES = ("collect", "select", "reconstruct", "export")
_HEADER = ("model", "recipe", "images", "final", "one step", "Fréchet", "Fréchet of full precision")


def measure(model: str, recipe: str, seed: int, args: argparse.Namespace) -> dict[str, Any] | None:
    """Runs the chain of one row; returns the row, or nothing if the chain fails."""
    name = f"{model}-{recipe}-{args.bits}-{seed}"
    run = args.out / "runs" / name
    command = [sys.executable, "-m", "edadm_cli", "run", "--model", model, "--bits", args.bits, "--recipe", recipe]
    command += ["--num-images", str(args.num_images), "--seed", str(seed), "--device", args.device]
    command += ["--run", str(run), "--json", *args.options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print(f"{name}: edadm run ended with exit code {done.returncode}", file=sys.stderr)
        return None
    record = json.loads(done.stdout)
    stages = {**record, **record["results"][args.bits]}
    seconds = sum(stages[name]["seconds"] for name in _STAGES)
    evaluation = json.loads((run / "evaluate" / args.bits / "evaluation.json").read_text())
    distance = evaluation["distance_to_full_precision"]
    one_step = distance.get("guided_one_step_rel_l2") or distance["one_step_rel_l2"]
    return {
        "model": model,
        "recipe": recipe,
        "seed": seed,
        "seconds": seconds,
        "final": distance["latent_rel_l2"],
        "one_step": one_step,
        "frechet": evaluation["metrics"]["frechet_distance"]["value"],
        "frechet_full_precision": evaluation["full_precision"]["frechet_distance"]["value"],
        "num_images": args.num_images,
        "bits": args.bits,
    }


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a file; none if it is missing."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns a Markdown table of the means over the seeds, with a line per model, recipe and number of images."""
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["model"], row["recipe"], row["num_images"]].append(row)
    lines = [_HEADER, ("---",) * len(_HEADER)]
    order = (*MODELS, *RECIPES)
    for model, recipe, num_images in sorted(groups, key=lambda key: (order.index(key[0]), order.index(key[1]), key[2])):
        rows_of_one = groups[model, recipe, num_images]
        keys = ("final", "one_step", "frechet", "frechet_full_precision")
        means = (f"{statistics.mean(row[key] for row in rows_of_one):.4f}" for key in keys)
        lines.append((f"`{model}`", f"`{recipe}`", str(num_images), *means))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Measures what is missing, or prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("studies/quick"))
    parser.add_argument("--rows", type=Path, help="print the table of the rows of this file")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=RECIPES)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0,))
    parser.add_argument("--bits", default="w8a8")
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--device", default="auto")
    args, more = parser.parse_known_args()
    args.options = more  # they go to edadm run
    if args.rows is not None:
        print(table([row for row in read_rows(args.rows) if row["bits"] == args.bits]))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "rows.jsonl"
    names = ("model", "recipe", "bits", "seed", "num_images")
    done = {tuple(row[name] for name in names) for row in read_rows(path)}
    for seed, model, recipe in product(args.seeds, args.models, args.recipes):
        is_done = (model, recipe, args.bits, seed, args.num_images) in done
        row = None if is_done else measure(model, recipe, seed, args)
        if row is not None:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
