"""Make the device mesh of a config and put batches on it, split over `data` and `fsdp`."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qbheat_jax.errors import UserError

# data: the batch is split. fsdp: the batch and the parameters are. model: heads and hidden units of transformer blocks are.
AXES = ("data", "fsdp", "model")
BATCH = PartitionSpec(("data", "fsdp"))


def make_mesh(config_mesh: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh of the sizes asked for, {axis: size}; one may be -1 and takes what is left, one that is not named is 1.

    On TPUs the axes are laid along those of the chips' network; elsewhere devices come in their order, `model` fastest.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: int(config_mesh.get(axis, 1)) for axis in AXES}
    known = int(np.prod([n for n in sizes.values() if n != -1]))
    shape = [len(devices) // known if n == -1 else n for n in sizes.values()]
    if int(np.prod(shape)) != len(devices):
        asked = ", ".join(f"mesh.{axis}={n}" for axis, n in sizes.items())
        raise UserError(f"{asked} does not fit the {len(devices)} devices here: the product must be their number")
    try:
        laid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError):  # a network it knows no layout for, such as two devices a chip
        laid = np.asarray(devices).reshape(shape)
    return Mesh(laid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of a batch this process's devices hold, int64[n] ascending. Devices along `model` hold the same ones."""
    parts = NamedSharding(mesh, BATCH).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[part] for part in parts]))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, batch_size: int | None = None) -> dict[str, jax.Array]:
    """This process's `rows` of a batch, dict of numpy arrays [rows, ...] -> global arrays [batch_size, ...] on the mesh."""
    return {key: put(value, mesh, batch_size) for key, value in batch.items()}


def put(local: np.ndarray, mesh: Mesh, batch_size: int | None = None) -> jax.Array:
    """One array of `put_batch`. batch_size: None where this process holds all of it."""
    sharding, shape = NamedSharding(mesh, BATCH), (batch_size or len(local), *local.shape[1:])
    place = np.full(shape[0], -1)
    place[rows(mesh, shape[0])] = np.arange(len(local))
    # A sharding over devices has an index for each of them, though the callback's type allows None.
    return jax.make_array_from_callback(shape, sharding, lambda index: local[place[index[0]]])  # type: ignore[index]
