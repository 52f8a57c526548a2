"""The CPU engine: a denoiser as an OpenVINO graph whose products run in INT8."""

from edadm_cli.engines.openvino.engine import OpenVinoEngine

__all__ = ["OpenVinoEngine"]
