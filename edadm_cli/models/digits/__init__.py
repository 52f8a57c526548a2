"""Small diffusion models of handwritten digits that ship with the package, and their training."""
