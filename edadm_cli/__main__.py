"""`python -m edadm_cli`: the `edadm` command, in the form that `torchrun -m` and `accelerate launch -m` start."""

import sys

from edadm_cli.cli.start import main

if __name__ == "__main__":
    sys.exit(main())
