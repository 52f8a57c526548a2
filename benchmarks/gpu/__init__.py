"""What the programs for GPUs share: a UNet's kernel calls, timing, cases in processes, and jobs in lanes."""
