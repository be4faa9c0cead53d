"""The program: `python -m qbheat_jax`, and `qbheat`, which is the same."""

import sys

from qbheat_jax import cli, machine


def start():
    """Runs the command of this process's arguments -> exit code."""
    machine.tune_malloc()
    return cli.main()


if __name__ == "__main__":
    sys.exit(start())
