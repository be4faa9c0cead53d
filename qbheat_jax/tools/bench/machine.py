"""On what was measured, and the same number of threads for everything that is."""

import os
import pathlib
import platform

import jax

from qbheat_jax.errors import UserError
from qbheat_jax.report.environment import versions
from qbheat_jax.tools.bench import timing
from qbheat_jax.train.runtime import cores

# The share of a GPU's memory that jax takes when it starts, by its present and its former name.
MEMORY, FORMER_MEMORY = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
_MEMORY_SET = {MEMORY, FORMER_MEMORY, "XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_ALLOCATOR"}
_PACKAGES = ("qbheat_jax", "jax", "jaxlib", "flax", "torch", "tensorflow-cpu", "tensorflow", "pillow", "numpy")


def limit_threads(threads):
    """Leaves this process and all its threads as many cores: XLA takes one thread for each, and has no other switch."""
    if threads == cores():
        return
    if not hasattr(os, "sched_setaffinity"):
        raise UserError(f"--threads {threads}: on this system XLA always takes all cores, leave it out")
    kept = sorted(os.sched_getaffinity(0))[:threads]
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), kept)


def machine(threads):
    """Dict of words and numbers."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "device": jax.devices()[0].device_kind,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": dict(versions(_PACKAGES)),
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", ""),
        "sends_ahead": timing.sends_ahead(),
        "jax_memory_fraction": _jax_memory_fraction(),
    }


def share_memory(options, environment=os.environ):
    """Have jax take 0.45 of a GPU's memory and leave PyTorch the rest; by default jax takes 0.75.

    Does nothing without peers, nor where the environment sets how jax takes memory. Call it before jax starts its backend.
    On a CPU the variable has no effect.
    """
    if options.peers and {"forward", "step"} & set(options.parts) and not _MEMORY_SET & environment.keys():
        environment[MEMORY] = "0.45"


def _jax_memory_fraction():
    """The share of the GPU's memory that jax was told to take; "" where there is no GPU or the environment has none."""
    return (os.environ.get(MEMORY) or os.environ.get(FORMER_MEMORY, "")) if jax.default_backend() == "gpu" else ""


def _processor():
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
