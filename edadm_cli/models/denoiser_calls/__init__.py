"""Calls of a denoiser as data.

`calls` takes a call apart into tensors and a template, and `call_templates` builds the call again from both.
`calibration` builds the calls of the calibration set. `predictions` finds the prediction in what a denoiser returns.
"""
