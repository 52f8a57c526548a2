"""The denoiser that reconstructions are tested with."""

from tests.unit.reconstruct.conftest import make_setting

__all__ = ["make_setting"]
