"""Where arrays live: the mesh from the config, parameters by ordered rules, batches over data and fsdp."""

import re

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qbheat_jax import trees
from qbheat_jax.errors import UserError

# data: the batch is split. fsdp: the batch and the parameters are. model: heads and hidden units of transformer blocks are.
AXES = ("data", "fsdp", "model")
BATCH = PartitionSpec(("data", "fsdp"))

# The first pattern found in a leaf's name decides. "fsdp" means: the largest dimension that the axis divides is split
# over it. A PartitionSpec is used without the axes that do not divide their dimension. Small leaves are not split over
# fsdp. Optimizer moments, averaged parameters and MoCo's key encoder carry their parameter's name, so they follow it.
RULES = (
    # Tensor parallelism (Megatron-LM, arXiv 1909.08053): what follows qkv and fc1 needs its own part of their outputs
    # alone, so that a block exchanges activations twice, after proj and after fc2.
    (r"/block\d+/(attn/qkv|fc1)/kernel$", PartitionSpec("fsdp", "model")),
    (r"/block\d+/(attn/qkv|fc1)/bias$", PartitionSpec("model")),
    (r"/block\d+/(attn/proj|fc2)/kernel$", PartitionSpec("model", "fsdp")),
    (r"batch_stats/key_\w+/params/", "fsdp"),  # MoCo's momentum encoder
    (r"batch_stats/", PartitionSpec()),  # MoCo's queue too: every example is compared with all of it
    (r"decoder/heat/", PartitionSpec()),  # propagators are powers of whole matrices
    (r"(params|ema|mu|nu)/", "fsdp"),
    (r"", PartitionSpec()),
)
SMALLEST_SPLIT = 2**12  # numbers; below it a leaf costs more to gather over fsdp than to keep


def make_mesh(config_mesh, devices=None):
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


def _spec(name, leaf, mesh, rules):
    rule = next(rule for pattern, rule in rules if re.search(pattern, name))

    def splits(axis, n):
        large = axis != "fsdp" or leaf.size >= SMALLEST_SPLIT
        return axis is not None and mesh.shape[axis] > 1 and n % mesh.shape[axis] == 0 and large

    if rule == "fsdp":
        dimensions = sorted((n, d) for d, n in enumerate(leaf.shape) if splits("fsdp", n))
        rule = ["fsdp" if dimensions and d == dimensions[-1][1] else None for d in range(leaf.ndim)]
    axes = [axis if splits(axis, n) else None for axis, n in zip(rule, leaf.shape)]
    return PartitionSpec(*axes) if any(axes) else PartitionSpec()


def shardings(tree, mesh, rules=RULES):
    """A NamedSharding for every leaf of a tree of arrays or shapes."""
    return trees.map_with_names(lambda name, leaf: NamedSharding(mesh, _spec(name, leaf, mesh, rules)), tree)


def spread(batch, objective, mesh):
    """Inside the jitted step: a batch whose images are split over `model` too, where the encoder is not.

    Otherwise the devices along `model` would all encode the same images. And XLA, which splits the gradient of a grouped
    convolution's kernel wrongly where devices hold the same images (jax 0.10: it comes out as many times too large as there
    are such devices), would train another model.
    """
    if mesh.shape["model"] == 1 or hasattr(objective.encoder, "heads"):
        return batch
    everywhere = NamedSharding(mesh, PartitionSpec(AXES))
    images = {name: x for name, x in batch.items() if name.startswith("image")}
    return {**batch, **jax.lax.with_sharding_constraint(images, everywhere)}


def check_batch(batch_size, objective, mesh, accumulate=1):
    """Raises UserError where the batch, or each of the `accumulate` parts of it, does not divide over the devices."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"] if hasattr(objective.encoder, "heads") else mesh.size
    if batch_size % (devices * accumulate):
        times = f" times accumulate={accumulate}, {devices * accumulate}" if accumulate > 1 else ""
        but = " along data and fsdp" if devices < mesh.size else ""
        raise UserError(
            f"batch_size={batch_size} is not accepted: it takes a multiple of the mesh's {devices} devices{but}{times}"
        )


def check_heads(objective, mesh):
    """Raises UserError where the attention heads of an objective's encoder or decoder do not divide over `model`."""
    for part in ("encoder", "decoder"):
        heads = getattr(getattr(objective, part, None), "heads", 1)
        if heads % mesh.shape["model"]:
            raise UserError(
                f"mesh.model={mesh.shape['model']} is not accepted: the {part} has {heads} attention heads, so it takes a "
                f"divisor of {heads}"
            )


def check_split(shardings, mesh):
    """Raises UserError where the axis `model` has devices and nothing of the train state is split over it."""
    if mesh.shape["model"] > 1 and not any("model" in s.spec for s in jax.tree.leaves(shardings)):
        raise UserError(
            f"mesh.model={mesh.shape['model']} is not accepted: this model has no transformer blocks to split, so it takes 1"
        )


def rows(mesh, batch_size):
    """Which rows of a batch this process's devices hold, int64[n] ascending. Devices along `model` hold the same ones."""
    parts = NamedSharding(mesh, BATCH).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[part] for part in parts]))


def put_batch(batch, mesh, batch_size=None):
    """This process's `rows` of a batch, dict of numpy arrays [rows, ...] -> global arrays [batch_size, ...] on the mesh."""
    return {key: put(value, mesh, batch_size) for key, value in batch.items()}


def put(local, mesh, batch_size=None):
    """One array of `put_batch`. batch_size: None where this process holds all of it."""
    sharding, shape = NamedSharding(mesh, BATCH), (batch_size or len(local), *local.shape[1:])
    place = np.full(shape[0], -1)
    place[rows(mesh, shape[0])] = np.arange(len(local))
    return jax.make_array_from_callback(shape, sharding, lambda index: local[place[index[0]]])
