"""Tiny random pipelines of diffusers' own classes, one per kind of denoiser, and the table that they make."""
