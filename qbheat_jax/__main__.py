"""The program: `python -m qbheat_jax`, and `qbheat`, which is the same."""

import sys

from qbheat_jax import cli, machine


def start():
    """Runs the command of this process's arguments -> exit code."""
    machine.take_large_pages()
    return cli.main()


if __name__ == "__main__":
    sys.exit(start())
