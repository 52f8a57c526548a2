"""Trains the digits models: `python -m edadm_cli.models.digits.train --data mnist.npz --out DIR`."""
