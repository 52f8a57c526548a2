"""The CPU engine, which runs a denoiser as an OpenVINO graph whose products are computed in INT8."""

from edadm_cli.engines.openvino.engine import OpenVinoEngine

__all__ = ["OpenVinoEngine"]
