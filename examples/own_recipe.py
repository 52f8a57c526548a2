"""Quantizes with your own recipe: no learning, few candidates for a range, and the first layer in eight bits.

python examples/own_recipe.py [MODEL] [RUN]
"""

import sys
from pathlib import Path

import edadm_cli

model = sys.argv[1] if len(sys.argv) > 1 else "digits-sd"
run = Path(sys.argv[2] if len(sys.argv) > 2 else "runs/example-recipe")
run.mkdir(parents=True, exist_ok=True)

recipe = run / "mine.toml"
recipe.write_text("""extends = "rtn"

[ranges]
weight = "search"
num_candidates = 4

[[layers]]
pattern = "conv_in"
weight_bits = 8
""")
result = edadm_cli.quantize(model, bits="w4a8", recipe=recipe, run=run, num_trajectories=4, num_steps=4, batch_size=4)
coverage = result.reconstruct.coverage
print(f"recipe {result.reconstruct.recipe}: {coverage.quantized} of {coverage.planned} layers quantized")
