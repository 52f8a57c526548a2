"""Writes quantized denoisers as ONNX files with QuantizeLinear and DequantizeLinear, and runs them in ONNX Runtime."""

from edadm_cli.engines.onnx.engine import OnnxRuntimeEngine

__all__ = ["OnnxRuntimeEngine"]
