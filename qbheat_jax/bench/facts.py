"""On what was measured, and the same number of threads for everything that is."""

import os
import pathlib
import platform

import jax

from qbheat_jax.bench.options import available
from qbheat_jax.errors import UserError
from qbheat_jax.report.facts import versions

_PACKAGES = ("qbheat_jax", "jax", "jaxlib", "flax", "torch", "tensorflow-cpu", "tensorflow", "pillow", "numpy")


def limit_threads(threads):
    """Leaves this process and all its threads as many cores: XLA takes one thread for each, and has no other switch."""
    if threads == available():
        return
    if not hasattr(os, "sched_setaffinity"):
        raise UserError(f"--threads {threads}: on this system XLA always takes all cores, leave it out")
    cores = sorted(os.sched_getaffinity(0))[:threads]
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), cores)


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
    }


def _processor():
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
