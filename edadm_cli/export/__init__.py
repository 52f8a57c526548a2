"""Quantization parameters packed into a diffusers folder that loads like any other, and the proof that it does."""
