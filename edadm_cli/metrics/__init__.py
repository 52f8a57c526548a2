"""Metrics of image quality: one object per metric, with all of its properties.

The stages ask the registry (`edadm_cli.metrics.registry`): `evaluate` computes metrics, `report` shows them. Other
packages add metrics through the entry-point group `edadm.metrics`.
"""
