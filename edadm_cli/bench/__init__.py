"""Parity first, then speed: how fast, how small and how exact a quantized denoiser is, and what bounds it."""
