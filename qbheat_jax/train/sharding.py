"""Shard the train state: parameters by ordered rules; check that a model fits its mesh."""

import re

import jax
from jax.sharding import NamedSharding, PartitionSpec

from qbheat_jax import device_mesh, pytree
from qbheat_jax.errors import UserError

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
    return pytree.map_with_names(lambda name, leaf: NamedSharding(mesh, _spec(name, leaf, mesh, rules)), tree)


def spread(batch, objective, mesh):
    """Inside the jitted step: a batch whose images are split over `model` too, where the encoder is not.

    Otherwise the devices along `model` would all encode the same images. And XLA, which splits the gradient of a grouped
    convolution's kernel wrongly where devices hold the same images (jax 0.10: it comes out as many times too large as there
    are such devices), would train another model.
    """
    if mesh.shape["model"] == 1 or objective.encoder.splits_heads:
        return batch
    everywhere = NamedSharding(mesh, PartitionSpec(device_mesh.AXES))
    images = {name: x for name, x in batch.items() if name.startswith("image")}
    return {**batch, **jax.lax.with_sharding_constraint(images, everywhere)}


def check_batch(batch_size, objective, mesh, accumulate=1):
    """Raises UserError where the batch, or each of the `accumulate` parts of it, does not divide over the devices."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"] if objective.encoder.splits_heads else mesh.size
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
