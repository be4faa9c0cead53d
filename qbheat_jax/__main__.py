"""Entry point of `python -m qbheat_jax` and of `qbheat`."""

import sys

from qbheat_jax import cli, console
from qbheat_jax.train import runtime


def start():
    """Run the command given in `sys.argv` and return its exit code."""
    runtime.tune_malloc()
    with console.Program() as program:
        program.code = cli.main()
    return program.code


if __name__ == "__main__":
    sys.exit(start())
