"""Files that ComfyUI reads: one safetensors file per denoiser, with its original tensor names and eight-bit weights."""
