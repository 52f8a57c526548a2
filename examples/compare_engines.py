"""Generates the same image with every engine that runs on this machine, and compares them.

python examples/compare_engines.py EXPORT

EXPORT is that of a text-to-image model, such as runs/digits-sd/export/w4a8.
"""

import sys

import numpy as np
import torch

import edadm_cli
from edadm_cli.engines.registry import engine_facts

if len(sys.argv) != 2:
    sys.exit(__doc__)
images = {}
for name in ["torch", *(facts.name for facts in engine_facts() if facts.refusals["cpu"] is None)]:
    pipeline = edadm_cli.load(sys.argv[1], engine=name, device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    image = pipeline("a handwritten seven", num_inference_steps=2, generator=noise).images[0]
    images[name] = np.asarray(image, dtype=float)

for name, image in images.items():
    print(f"{name:12} mean difference from torch: {np.abs(image - images['torch']).mean():.3f} of 255")
