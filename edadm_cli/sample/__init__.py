"""Samples images from an export."""

from edadm_cli.artifacts import Stage
from edadm_cli.config import SampleConfig

FOLDER = "samples"
"""The folder of a run that holds the images."""
STAGE = Stage("sample", SampleConfig, finds_itself=True, folder=FOLDER)
