"""Shard the train state: parameters by ordered rules; check that a model fits its mesh."""

import re

import jax
from jax.sharding import NamedSharding, PartitionSpec

from qbheat_jax import device_mesh, pytree
from qbheat_jax.errors import UserError

# The first pattern found in a leaf's name decides. "fsdp" splits the largest dimension that the axis divides. An axis of a
# PartitionSpec that does not divide its dimension is left out. Leaves below SMALLEST_SPLIT are not split over fsdp. Optimizer
# moments and averaged parameters carry their parameter's name, so they follow it. Copies of parameters in a method's state
# (`Method.sharded_like_params`) are looked up as parameters.
RULES = (
    # Tensor parallelism (Megatron-LM, arXiv 1909.08053). Each device computes its part of qkv and fc1 and what follows, so a
    # block exchanges activations twice: after proj and after fc2.
    (r"/block\d+/(attn/qkv|fc1|w12)/kernel$", PartitionSpec("fsdp", "model")),
    (r"/block\d+/(attn/qkv|fc1|w12)/bias$", PartitionSpec("model")),
    (r"/block\d+/(attn/proj|fc2|w3)/kernel$", PartitionSpec("model", "fsdp")),
    (r"batch_stats/", PartitionSpec()),  # a queue of negatives too: every example is compared with all of it
    (r"decoder/heat/", PartitionSpec()),  # propagators are powers of whole matrices
    (r"(params|ema|mu|nu|trace)/", "fsdp"),
    (r"", PartitionSpec()),
)
SMALLEST_SPLIT = 2**12  # numbers; gathering a smaller leaf costs more than keeping it whole


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


def shardings(tree, mesh, rules=RULES, like_params=()):
    """Return a NamedSharding for every leaf of a train state of arrays or shapes.

    like_params: entries of the method's state that are copies of parameters, see `Method.sharded_like_params`.
    """

    def sharding(name, leaf):
        return NamedSharding(mesh, _spec(_as_param(name, like_params), leaf, mesh, rules))

    return pytree.map_with_names(sharding, tree)


def _as_param(name, like_params):
    """Return the name that a leaf is looked up by: that of a parameter where it is a copy of one.

    The running statistics that go with a copy are not.

    >>> _as_param("batch_stats/teacher/params/conv/kernel", ("teacher",))
    'params/teacher/conv/kernel'
    >>> _as_param("batch_stats/teacher/batch_stats/bn/mean", ("teacher",))
    'batch_stats/teacher/batch_stats/bn/mean'
    """
    collection, *path = name.split("/")
    if collection != "batch_stats" or path[0] not in like_params or "batch_stats" in path:
        return name
    return "/".join(["params", *(part for part in path if part != "params")])


def spread(batch, method, mesh):
    """Split the batch's images over `model` too, where the encoder is not split. For use inside the jitted step.

    Otherwise the devices along `model` would encode the same images. XLA (jax 0.10) would also get the gradient of a grouped
    convolution's kernel wrong: it is too large by the number of devices with the same images.
    """
    if mesh.shape["model"] == 1 or method.encoder.splits_heads:
        return batch
    everywhere = NamedSharding(mesh, PartitionSpec(device_mesh.AXES))
    images = {name: x for name, x in batch.items() if name.startswith("image")}
    return {**batch, **jax.lax.with_sharding_constraint(images, everywhere)}


def check_batch(batch_size, method, mesh, accumulate=1):
    """Raise UserError where the batch, or each of its `accumulate` parts, does not divide over the devices."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"] if method.encoder.splits_heads else mesh.size
    if batch_size % (devices * accumulate):
        times = f" times accumulate={accumulate}, {devices * accumulate}" if accumulate > 1 else ""
        but = " along data and fsdp" if devices < mesh.size else ""
        raise UserError(
            f"batch_size={batch_size} is not accepted: it takes a multiple of the mesh's {devices} devices{but}{times}"
        )


def check_heads(method, mesh):
    """Raise UserError where the attention heads of the encoder or decoder do not divide over `model`."""
    for part in ("encoder", "decoder"):
        heads = getattr(getattr(method, part, None), "heads", 1)
        if heads % mesh.shape["model"]:
            raise UserError(
                f"mesh.model={mesh.shape['model']} is not accepted: the {part} has {heads} attention heads, so it takes a "
                f"divisor of {heads}"
            )


def check_split(shardings, mesh):
    """Raise UserError where the axis `model` has devices and nothing of the train state is split over it."""
    if mesh.shape["model"] > 1 and not any("model" in s.spec for s in jax.tree.leaves(shardings)):
        raise UserError(
            f"mesh.model={mesh.shape['model']} is not accepted: this model has no transformer blocks to split, so it takes 1"
        )
