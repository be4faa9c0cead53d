"""Where arrays live: the mesh from the config, parameters by ordered rules, batches over data and fsdp."""

import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qbheat_jax import trees
from qbheat_jax.errors import UserError

AXES = ("data", "fsdp")
BATCH = PartitionSpec(AXES)

# The first pattern found in a leaf's name decides. "fsdp" means: the largest dimension that the axis divides is split
# over it (small or indivisible leaves stay whole); anything else is a PartitionSpec used as it is. Optimizer moments and
# the averaged parameters carry their parameter's name, so they follow it.
RULES = (
    (r"batch_stats/key_\w+/params/", "fsdp"),  # MoCo's momentum encoder, like the encoder it follows
    (r"batch_stats/", PartitionSpec()),  # MoCo's queue too: every example is compared with all of it
    (r"decoder/heat/", PartitionSpec()),  # propagators are powers of whole matrices
    (r"(params|ema|mu|nu)/", "fsdp"),
    (r"", PartitionSpec()),
)
SMALLEST_SPLIT = 2**12  # numbers; below it a leaf costs more to gather than to keep


def make_mesh(config_mesh, devices=None):
    """Mesh with axes `data`, `fsdp` of the sizes asked for; one of them may be -1 and takes what is left."""
    devices = jax.devices() if devices is None else devices
    sizes = {axis: int(config_mesh[axis]) for axis in AXES}
    known = int(np.prod([n for n in sizes.values() if n != -1]))
    sizes = {axis: len(devices) // known if n == -1 else n for axis, n in sizes.items()}
    if int(np.prod(list(sizes.values()))) != len(devices):
        asked = ", ".join(f"mesh.{axis}={config_mesh[axis]}" for axis in AXES)
        raise UserError(f"{asked} does not fit the {len(devices)} devices here: the product must be their number")
    return Mesh(np.asarray(devices).reshape([sizes[a] for a in AXES]), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _spec(name, leaf, mesh, rules):
    rule = next(rule for pattern, rule in rules if re.search(pattern, name))
    if rule != "fsdp":
        return rule
    size = mesh.shape["fsdp"]
    dimensions = sorted((n, d) for d, n in enumerate(leaf.shape) if n % size == 0)
    if size == 1 or not dimensions or leaf.size < SMALLEST_SPLIT:
        return PartitionSpec()
    return PartitionSpec(*("fsdp" if d == dimensions[-1][1] else None for d in range(leaf.ndim)))


def shardings(tree, mesh, rules=RULES):
    """A NamedSharding for every leaf of a tree of arrays or shapes."""
    return trees.map_with_names(lambda name, leaf: NamedSharding(mesh, _spec(name, leaf, mesh, rules)), tree)


def check_batch(batch_size, mesh):
    """Raises UserError where the batch does not divide over the devices."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % devices:
        raise UserError(f"batch_size={batch_size} is not accepted: it takes a multiple of the mesh's {devices} devices")


def put_batch(batch, mesh):
    """This process's part of a batch, dict of numpy arrays [B / processes, ...] -> global arrays [B, ...] on the mesh."""
    sharding = NamedSharding(mesh, BATCH)
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}
