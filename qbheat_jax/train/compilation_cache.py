"""Compiled programs that outlive their process, so that what was compiled once is not compiled again."""

import hashlib
import os
import pathlib
import platform

import jax
from etils import epath

from qbheat_jax import paths

NAME = ".compiled"


def keep(workdir):
    """Keeps what jax compiles in the nearest `.compiled` above the workdir, by default beside it; it may be deleted any time.

    Where jax has been told a place already (JAX_COMPILATION_CACHE_DIR), it stays that.
    """
    if jax.config.jax_compilation_cache_dir:
        return
    workdir = epath.Path(workdir) if paths.remote(workdir) else epath.Path(os.path.abspath(workdir))
    above = [folder / NAME for folder in workdir.parents]
    place = next((folder for folder in above if folder.exists()), above[0])
    jax.config.update("jax_compilation_cache_dir", str(place / _processor()))


def _processor():
    """A name for what this machine's programs run on: a CPU program may hold instructions that another CPU lacks."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        kind = sorted({line for line in lines if line.startswith(("flags", "Features"))})
    except OSError:
        kind = [platform.processor()]
    return f"{platform.machine()}-{hashlib.sha256(repr(kind).encode()).hexdigest()[:8]}"
