"""The program: `python -m qbheat_jax`, and `qbheat`, which is the same."""

import sys

from qbheat_jax import cli, console
from qbheat_jax.train import runtime


def start():
    """Runs the command of this process's arguments -> exit code."""
    runtime.tune_malloc()
    with console.Program() as program:
        program.code = cli.main()
    return program.code


if __name__ == "__main__":
    sys.exit(start())
