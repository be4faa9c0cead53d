"""Random keys by name and step, folded from one root key a run; there is no chain of splits to store or resume."""

import zlib

import jax


def root(seed):
    """Return the typed root key of a run."""
    return jax.random.key(seed)


def fold(key, name, step=None):
    """Return the key for one purpose (and step); the same (key, name, step) gives the same key in every process."""
    key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    return key if step is None else jax.random.fold_in(key, step)
