"""Prepares the data of the emoji models, and trains and measures them. This package is not part of the wheel."""
