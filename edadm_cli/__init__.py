"""Diffusion models made small and fast after training: EDA-DM (arXiv 2401.04585) as a command-line toolchain.

Importing the package, which is light, lets diffusers load exported pipelines.
"""

from edadm_cli.integrations.autoload import register
from edadm_cli.version import __version__

__all__ = ["__version__"]

register()
