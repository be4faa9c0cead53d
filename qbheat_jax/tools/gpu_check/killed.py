"""The command line of qbheat_jax, killed with SIGKILL once a step is done, and with the encoder of `--tiny`.

`python -m qbheat_jax.tools.gpu_check.killed STEP pretrain ...`; with a STEP of 0 it is not killed.
"""

import os
import signal
import sys

from qbheat_jax import cli
from qbheat_jax.tools.gpu_check import tiny
from qbheat_jax.train import metrics


def main():
    """Run the rest of the arguments -> exit code, where the step is never reached."""
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
