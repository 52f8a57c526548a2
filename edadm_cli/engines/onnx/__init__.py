"""Quantized denoisers as ONNX files with QuantizeLinear and DequantizeLinear, and ONNX Runtime on them."""

from edadm_cli.engines.onnx.engine import OnnxRuntimeEngine

__all__ = ["OnnxRuntimeEngine"]
