"""Run the command line with the encoder of `--tiny` registered, and kill it with SIGKILL after a given step.

Usage: `python -m qbheat_jax.tools.gpu_check.kill_after STEP pretrain ...`. With STEP 0 it is not killed.
"""

import os
import runpy
import signal
import sys


def command(sizes, step=0):
    """Return the argv of the command line, to which a command's own arguments are added; `step`: kill it after that one."""
    own = step or sizes.tiny
    return [sys.executable, "-m", *(["qbheat_jax.tools.gpu_check.kill_after", str(step)] if own else ["qbheat_jax"])]


def main():
    """Run the rest of the arguments as `python -m qbheat_jax` does."""
    from qbheat_jax.tools.gpu_check import tiny
    from qbheat_jax.train import metrics

    tiny.register()
    step, original = int(sys.argv[1]), metrics.Progress.advance

    def advance(self, done):
        original(self, done)
        if done == step:
            os.kill(os.getpid(), signal.SIGKILL)

    metrics.Progress.advance = advance
    sys.argv[1:] = sys.argv[2:]
    runpy.run_module("qbheat_jax", run_name="__main__")


if __name__ == "__main__":
    main()
