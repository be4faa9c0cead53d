"""Make the device mesh of a config, and put batches on it, split over `data` and `fsdp`."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qbheat_jax.errors import UserError

# data splits the batch; fsdp splits batch and parameters; model splits heads and hidden units of transformer blocks.
AXES = ("data", "fsdp", "model")
BATCH = PartitionSpec(("data", "fsdp"))


def make_mesh(config_mesh: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh of the given axis sizes.

    On TPUs the axes follow the chips' network. Elsewhere devices keep their order, with `model` fastest.

    Args:
      config_mesh: {axis: size}. One size may be -1 and takes the remaining devices; a missing axis has size 1.
      devices: list of devices; None for all.

    Raises:
      UserError: the product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: int(config_mesh.get(axis, 1)) for axis in AXES}
    known = int(np.prod([n for n in sizes.values() if n != -1]))
    shape = [len(devices) // known if n == -1 else n for n in sizes.values()]
    if int(np.prod(shape)) != len(devices):
        asked = ", ".join(f"mesh.{axis}={n}" for axis, n in sizes.items())
        raise UserError(
            f"{asked} does not fit the {len(devices)} devices: the product of the sizes must equal their number"
        )
    try:
        laid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError):  # no known layout for this network, such as two devices a chip
        laid = np.asarray(devices).reshape(shape)
    return Mesh(laid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Return the batch rows that this process's devices hold, int64 [n] ascending; devices along `model` share rows."""
    parts = NamedSharding(mesh, BATCH).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[part] for part in parts]))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, batch_size: int | None = None) -> dict[str, jax.Array]:
    """Put this process's `rows` of a batch on the mesh.

    Args:
      batch: dict of numpy arrays [rows, ...].
      mesh: the device mesh.
      batch_size: global batch size; None if this process holds all rows.

    Returns:
      dict of global arrays [batch_size, ...].
    """
    return {key: put(value, mesh, batch_size) for key, value in batch.items()}


def put(local: np.ndarray, mesh: Mesh, batch_size: int | None = None) -> jax.Array:
    """Put one array on the mesh, as `put_batch` does for a dict."""
    sharding, shape = NamedSharding(mesh, BATCH), (batch_size or len(local), *local.shape[1:])
    place = np.full(shape[0], -1)
    place[rows(mesh, shape[0])] = np.arange(len(local))
    # A sharding over devices has an index for each of them, though the callback's type allows None.
    return jax.make_array_from_callback(shape, sharding, lambda index: local[place[index[0]]])  # type: ignore[index]
