"""The arithmetic of quantization: grids, range search, learned rounding, quantized layers. Pure: tensors in and out."""
