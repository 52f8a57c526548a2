"""What the recipe `quick` costs in quality, beside `default`, at one bit width, on the models that ship with weights.

    python benchmarks/quick_cost.py --out studies/quick --device cuda
    python benchmarks/quick_cost.py --out studies/quick --table

A row is `edadm run` of one model with one recipe and one seed. Each leaves one JSON file in OUT; the same command skips
what is there, so that a study that was killed goes on. Other options, such as `--num-steps 4`, go to `edadm run`. The
table shows means over the seeds.

Columns: seconds of collect, select, reconstruct and export; `final`, the relative L2 distance of the final latents to
full precision of the same seed; `one step`, the relative L2 error of single predictions on held-out trajectories
(guided, where the model has guidance); the Fréchet distance to real images, and full precision's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MODELS = ("digits-ddpm", "digits-sd", "emoji-sd", "emoji-dit")
RECIPES = ("default", "quick")
_STAGES = ("collect", "select", "reconstruct", "export")
_HEADER = ("model", "recipe", "seconds", "final", "one step", "Fréchet", "Fréchet of full precision")


def measure(out: Path, name: str, model: str, recipe: str, seed: int, args: argparse.Namespace) -> None:
    """Runs the chain of one row and writes its record."""
    run = out / "runs" / name
    command = [sys.executable, "-m", "edadm_cli", "run", "--model", model, "--bits", args.bits, "--recipe", recipe]
    command += ["--num-images", str(args.num_images), "--seed", str(seed), "--device", args.device]
    command += ["--run", str(run), "--json", *args.options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print(f"{name}: edadm run ended with exit code {done.returncode}", file=sys.stderr)
        return
    record = json.loads(done.stdout)
    stages = {**record, **record["results"][args.bits]}
    seconds = sum(stages[name]["seconds"] for name in _STAGES)
    evaluation = json.loads((run / "evaluate" / args.bits / "evaluation.json").read_text())
    distance = evaluation["distance_to_full_precision"]
    one_step = distance.get("guided_one_step_rel_l2") or distance["one_step_rel_l2"]
    row = {
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
        "evaluation": evaluation,
    }
    (out / f"{name}.json").write_text(json.dumps(row, indent=1))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns a Markdown table of the means over the seeds."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["model"], row["recipe"]].append(row)
    lines = [_HEADER, ("---",) * len(_HEADER)]
    for model, recipe in ((model, recipe) for model in MODELS for recipe in RECIPES if (model, recipe) in groups):
        keys = ("seconds", "final", "one_step", "frechet", "frechet_full_precision")
        means = {key: statistics.mean(row[key] for row in groups[model, recipe]) for key in keys}
        cells = (f"{means['seconds']:.0f}", *(f"{means[key]:.4f}" for key in keys[1:]))
        lines.append((f"`{model}`", f"`{recipe}`", *cells))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Measures what is missing, or prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--table", action="store_true", help="print the table of what was measured")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, choices=RECIPES)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0,))
    parser.add_argument("--bits", default="w8a8")
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--device", default="auto")
    args, args.options = parser.parse_known_args()  # the rest goes to edadm run
    args.out.mkdir(parents=True, exist_ok=True)
    if args.table:
        print(table([json.loads(path.read_text()) for path in sorted(args.out.glob("*.json"))]))
        return
    for seed in args.seeds:
        for model in args.models:
            for recipe in args.recipes:
                name = f"{model}-{recipe}-{seed}"
                if not (args.out / f"{name}.json").exists():
                    measure(args.out, name, model, recipe, seed, args)


if __name__ == "__main__":
    main()
