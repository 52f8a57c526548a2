"""Converts models that are stored in one checkpoint file into pipelines of diffusers."""
