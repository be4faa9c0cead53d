"""Run a function over batches on all devices of this machine. The only module that uses `jax.pmap`."""

import functools

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def pmap_batches(mapped, variables, batches):
    """Yield `function(variables, inputs)` of every batch as numpy arrays, without padded rows.

    The variables are copied to every device once. Batches are padded to a multiple of the number of devices, so the result
    does not depend on that number.

    Args:
      mapped: `pmap(function)`; the function returns a tree of arrays [B, ...].
      variables: tree of arrays.
      batches: pairs of inputs [B, ...] and mask bool [B], False for padded rows.
    """
    devices = jax.local_devices()
    copies = _replicate(variables, devices)
    for inputs, mask in batches:
        padding = -len(inputs) % len(devices)
        inputs = np.concatenate([inputs, np.zeros((padding, *inputs.shape[1:]), inputs.dtype)])
        outputs = mapped(copies, inputs.reshape(len(devices), -1, *inputs.shape[1:]))
        rows = np.flatnonzero(np.concatenate([mask, np.zeros(padding, bool)]))
        yield jax.tree.map(functools.partial(_rows, rows), outputs)


def pmap(function):
    """Return function(variables, inputs) pmapped over this machine's devices. Make it once and reuse it: it compiles once."""
    return jax.pmap(function, devices=jax.local_devices())


def _rows(rows, outputs):
    """Return the given rows of outputs [devices, B / devices, ...], merged to [B, ...]."""
    return np.asarray(outputs).reshape(-1, *outputs.shape[2:])[rows]


def _replicate(tree, devices):
    """Return the tree with every leaf [...] as [devices, ...], one copy on each device."""
    mesh = Mesh(np.asarray(devices), ("device",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("device"))
    return jax.tree.map(lambda x: jax.device_put(np.broadcast_to(x, (len(devices), *np.shape(x))), sharding), tree)
