"""Models that lie in one checkpoint file rather than in a diffusers folder."""
