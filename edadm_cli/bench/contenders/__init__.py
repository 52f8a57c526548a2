"""What a bench can measure beside a quantized denoiser: full precision, and denoisers quantized by other tools."""
