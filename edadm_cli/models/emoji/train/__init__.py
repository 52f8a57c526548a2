"""Training of the emoji models: data, stages, measurements. This package is not part of the wheel."""
