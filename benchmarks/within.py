"""Runs a command of `edadm` that may use so many GiB of the GPU, as on a card of 80 GB.

python benchmarks/within.py 74.5 reconstruct --bits w4a8 --device cuda
"""

from __future__ import annotations

import sys

import torch


def main() -> None:
    """Bounds the memory of this process, and runs the command in it; without a GPU nothing is bounded."""
    gib = float(sys.argv.pop(1))
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total))
    from edadm_cli.cli.app import main as edadm

    sys.exit(edadm())


if __name__ == "__main__":
    main()
