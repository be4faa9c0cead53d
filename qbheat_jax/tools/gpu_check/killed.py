"""Run the command line with the encoder of `--tiny` registered, and kill it with SIGKILL after a given step.

Usage: `python -m qbheat_jax.tools.gpu_check.killed STEP pretrain ...`. With STEP 0 it is not killed.
"""

import os
import signal
import sys

from qbheat_jax import cli
from qbheat_jax.tools.gpu_check import tiny
from qbheat_jax.train import metrics


def main():
    """Run the command in `sys.argv[2:]`. Return its exit code if it ends before the step."""
    tiny.register()
    step, original = int(sys.argv[1]), metrics.Progress.advance

    def advance(self, done):
        original(self, done)
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)

    metrics.Progress.advance = advance
    return cli.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
