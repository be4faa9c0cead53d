"""Describe the machine, limit its threads, and share the GPU's memory with PyTorch."""

import os
import pathlib
import platform

import jax

from qbheat_jax.errors import UserError
from qbheat_jax.report.environment import versions
from qbheat_jax.tools.bench import timing
from qbheat_jax.train.runtime import cores

# Variables that set the fraction of a GPU's memory that jax preallocates: current and former name.
MEMORY, FORMER_MEMORY = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
_MEMORY_SET = {MEMORY, FORMER_MEMORY, "XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_ALLOCATOR"}
_PACKAGES = ("qbheat_jax", "jax", "jaxlib", "flax", "torch", "tensorflow-cpu", "tensorflow", "pillow", "numpy")


def limit_threads(threads):
    """Pin this process and its threads to `threads` cores.

    XLA starts one thread per available core and has no other setting.

    Raises:
      UserError: The system cannot pin processes.
    """
    if threads == cores():
        return
    if not hasattr(os, "sched_setaffinity"):
        raise UserError(f"--threads {threads} is not accepted: on this system XLA always uses all cores; omit the flag")
    kept = sorted(os.sched_getaffinity(0))[:threads]
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), kept)


def machine(threads):
    """Return a dict that describes the machine, the package versions and the settings."""
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
    """Limit jax to 0.45 of a GPU's memory (default: 0.75), so that PyTorch gets the rest.

    Call it before jax starts its backend. It does nothing without peers, or if the environment already configures jax's
    memory. On a CPU the variable has no effect.

    Args:
      options: A checked `options.Options`.
      environment: Mapping of environment variables, changed in place.
    """
    if options.peers and {"forward", "step"} & set(options.parts) and not _MEMORY_SET & environment.keys():
        environment[MEMORY] = "0.45"


def _jax_memory_fraction():
    """Return jax's fraction of the GPU's memory from the environment; "" without a GPU or a setting."""
    return (os.environ.get(MEMORY) or os.environ.get(FORMER_MEMORY, "")) if jax.default_backend() == "gpu" else ""


def _processor():
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
