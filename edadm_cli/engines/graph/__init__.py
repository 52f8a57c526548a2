"""Holds what all engines share that convert a denoiser to a graph: call interface, tracing and file description."""
