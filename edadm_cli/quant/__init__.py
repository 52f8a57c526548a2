"""The arithmetic of quantization on tensors: grids, range search, learned rounding, and quantized layers."""
