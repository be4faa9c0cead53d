"""Random keys by name and step: one root key a run, folded where it is used; no chain of splits to store or resume."""

import zlib

import jax


def root(seed):
    """The typed key of a run."""
    return jax.random.key(seed)


def fold(key, name, step=None):
    """The key for one purpose (and step). The same (root, name, step) gives the same key in any process, in any order."""
    key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    return key if step is None else jax.random.fold_in(key, step)
