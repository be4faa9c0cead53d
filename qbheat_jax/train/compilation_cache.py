"""Keep compiled programs on disk, so that later processes do not compile them again."""

import hashlib
import os
import pathlib
import platform

import jax
from etils import epath

from qbheat_jax import paths

NAME = ".compiled"


def keep(workdir):
    """Store what jax compiles in the nearest `.compiled` folder above the workdir, by default in the workdir's parent.

    The folder may be deleted at any time. A cache that is already configured (JAX_COMPILATION_CACHE_DIR) is used instead.
    """
    if jax.config.jax_compilation_cache_dir:
        return
    workdir = epath.Path(workdir) if paths.remote(workdir) else epath.Path(os.path.abspath(workdir))
    above = [folder / NAME for folder in workdir.parents]
    place = next((folder for folder in above if folder.exists()), above[0])
    jax.config.update("jax_compilation_cache_dir", str(place / _processor()))


def _processor():
    """Return a name for this machine's processor; a CPU program may use instructions that another CPU lacks."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        kind = sorted({line for line in lines if line.startswith(("flags", "Features"))})
    except OSError:
        kind = [platform.processor()]
    return f"{platform.machine()}-{hashlib.sha256(repr(kind).encode()).hexdigest()[:8]}"
