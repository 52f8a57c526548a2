"""Diffusion models of coloured emoji pictures that ship with the package, and their training."""
