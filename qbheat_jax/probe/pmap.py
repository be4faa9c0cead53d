"""The one room of `jax.pmap`: a function over batches, split over this machine's devices, padding left out."""

import functools

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def pmap_batches(mapped, variables, batches):
    """Yields `function(variables, inputs)` as numpy for every batch, without the rows that only fill it up.

    mapped: `pmap(function)`; the function's outputs are a tree of arrays [B, ...]. batches: pairs (inputs, mask), inputs an
    array [B, ...], mask bool[B], False where a row only fills the batch. The variables are copied to every device once; a
    batch is padded to a multiple of the devices, so any batch size gives the same rows on any number of them.
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
    """function(variables, inputs) over this machine's devices; made once for a loop, so that it is compiled once."""
    return jax.pmap(function, devices=jax.local_devices())


def _rows(rows, outputs):
    """[devices, B / devices, ...] -> the rows of [B, ...] that count."""
    return np.asarray(outputs).reshape(-1, *outputs.shape[2:])[rows]


def _replicate(tree, devices):
    """Every leaf [...] -> [devices, ...], one copy a device."""
    mesh = Mesh(np.asarray(devices), ("device",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("device"))
    return jax.tree.map(lambda x: jax.device_put(np.broadcast_to(x, (len(devices), *np.shape(x))), sharding), tree)
