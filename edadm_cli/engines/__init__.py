"""How an exported denoiser runs."""
