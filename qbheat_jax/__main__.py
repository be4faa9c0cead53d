"""The program: `python -m qbheat_jax`, and `qbheat`, which is the same."""

import sys

from qbheat_jax import cli, ending, machine


def start():
    """Runs the command of this process's arguments -> exit code."""
    machine.tune_malloc()
    with ending.Program() as program:
        program.code = cli.main()
    return program.code


if __name__ == "__main__":
    sys.exit(start())
