"""What the engines that make a graph of a denoiser share: its call interface, tracing, and what its files say."""
