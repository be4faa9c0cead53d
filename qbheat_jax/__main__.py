"""`python -m qbheat_jax`, the same as the `qbheat` command."""

import sys

from qbheat_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
