"""Warnings in words: what of a step is likely to be regretted, each with the figure that says so."""

import math

import jax

from qbheat_jax import pytree
from qbheat_jax.train import sharding

MIB = 2**20
LEAST_MOVED = 64 * MIB  # of a device and step; what is below it costs nothing that would show
LEAST_WAIT = 1e-4  # seconds
LAUNCH = 5e-6  # seconds; where kernels take less than that, sending them to a GPU takes as long as they do


def of_step(step, traced, products, where):
    """Of a traced step, before it is compiled. products: {type: operations}; where: topology.Topology."""
    lines = [_whole(step), _recompiles(step, traced)]
    if where.kind != "cpu":
        lines.append(_types(step, products))
    if where.tpu:
        lines.append(_few(step))
    return [line for line in lines if line]


def of_program(module, floors, where, mesh):
    """Of a compiled step.

    Args:
      module: hlo.Module.
      floors: As of `bounds.floors`, or empty.
      where: topology.Topology.
      mesh: {axis: size}.
    """
    lines = [_padding(module), _dominant(module, floors), _parameters_at_once(module), _batch_gathered(module, mesh)]
    lines.append(_recomputed(module))
    if where.gpu and floors:
        lines.append(_short(module, floors))
    return [*filter(None, lines), *_loops(module)]


def _types(step, products):
    wide = sum(n for name, n in products.items() if name not in ("bfloat16", "float16"))
    share = wide / max(1, sum(products.values()))
    if step.config.dtype == "float32":
        return "dtype is float32: what is multiplied takes twice the bytes of bfloat16 (--config.dtype bfloat16)"
    if share > 0.05:
        return f"{share:.0%} of the operations in matrix products have float32 operands, though dtype is bfloat16"


def _whole(step):
    """Parameters that fsdp was to split and could not."""
    size = step.mesh.shape["fsdp"]
    if size == 1:
        return None
    leaves = jax.tree.leaves(step.state.params)
    whole = [x for x in leaves if x.sharding.is_fully_replicated and x.size >= sharding.SMALLEST_SPLIT]
    share = pytree.count(whole) / step.parameters
    if share > 0.1:
        largest = max(whole, key=lambda x: x.size)
        return (
            f"{share:.0%} of the parameters are whole on every device, since no dimension divides by mesh.fsdp={size}, "
            f"such as one of shape {tuple(largest.shape)}"
        )


def _recompiles(step, traced):
    """A state that comes back other than it went in compiles a second program at the second step."""
    differ = [
        name
        for (name, before), after in zip(pytree.names(step.state), jax.tree.leaves(traced.out_info[0]))
        if (before.shape, before.dtype, before.weak_type)
        != (after.shape, after.dtype, getattr(after, "weak_type", False))
    ]
    if differ:
        return f"compiled again at the second step: {differ[0]} comes back with another type ({len(differ)} do)"


def _few(step):
    local = step.config.batch_size // (step.mesh.shape["data"] * step.mesh.shape["fsdp"])
    if local < 8:
        return f"{local} images a device: a TPU's registers hold 8 rows, a batch below 8 leaves some of them empty"


def _padding(module):
    moved, padding = module.traffic()
    found = module.most_padded()
    if moved > LEAST_MOVED and padding > 0.15 * moved and found:
        array, where = found
        return (
            f"{padding / moved:.0%} of what is moved in HBM fills up tiles; the worst is {array.dtype}"
            f"{list(array.shape)}, {array.bytes / MIB:.0f} MiB in {array.padded / MIB:.0f}{_at(where)}"
        )


def _dominant(module, floors):
    wait, others = floors.get("interconnect", 0.0), [v for k, v in floors.items() if k != "interconnect"]
    if wait < LEAST_WAIT or wait < 0.5 * max(others):
        return None
    collectives = module.collectives()
    kind, most = max(collectives.items(), key=lambda item: item[1].sent)
    share = most.sent / sum(c.sent for c in collectives.values())
    largest = max((c for c in module.each_collective() if c[1] == kind), key=lambda c: c[2].sent)
    return (
        f"the interconnect needs {wait * 1e3:.1f} ms a step, against {max(others) * 1e3:.1f} ms for the rest: {kind} "
        f"sends {share:.0%} of it, the largest{_at(largest[0])}"
    )


def _parameters_at_once(module):
    gathers = [c for c in module.each_collective() if c[1] == "all-gather"]
    total = sum(c[2].bytes for c in gathers)
    largest = max(gathers, key=lambda c: c[2].bytes, default=None)
    if largest and len(gathers) > 1 and largest[2].bytes > 0.5 * total and largest[2].bytes > LEAST_MOVED:
        return (
            f"one all-gather brings {largest[2].bytes / MIB:.0f} MiB of {total / MIB:.0f}{_at(largest[0])}: what it "
            "gathers is in memory at once"
        )


def _batch_gathered(module, mesh):
    """Activations that every device gathers, in a mesh where each could do with its own part of the batch."""
    gathers = [c for c in module.each_collective() if c[1] == "all-gather"]
    total = sum(c[2].bytes for c in gathers)
    if mesh["data"] == math.prod(mesh.values()) and total > LEAST_MOVED:
        largest = max(gathers, key=lambda c: c[2].bytes)
        return (
            f"{len(gathers)} all-gathers bring {total / MIB:.0f} MiB of the other devices' parts of the batch to each device, "
            f"which then computes on the whole batch, the largest{_at(largest[0])}"
        )


def _recomputed(module):
    instructions, moved = module.recomputed()
    share = moved / max(1, module.traffic()[0])
    if share > 0.01:
        return (
            f"memory is short: the compiler computes {instructions} results a second time to save it, which is {share:.0%} of "
            "the bytes moved; a smaller batch may be faster"
        )


def _short(module, floors):
    launches, seconds = sum(module.launches().values()), max(floors.values())
    if seconds < launches * LAUNCH:
        return (
            f"{launches:,} kernels in {seconds * 1e3:.2f} ms would be {seconds / launches * 1e6:.2g} us each: launching them "
            "takes about as long, so the step will be slower; a larger batch makes them longer"
        )


def _loops(module):
    lines = [
        f"a gather or scatter became a loop of {turns} turns, one after the other{_at(where)}"
        for turns, where in module.serial_gathers()
        if turns >= 8
    ]
    unknown = module.unknown_loops()
    if unknown:
        lines.append(f"{unknown} loops do not say how often they run; bytes and collectives count them once")
    return lines


def _at(op_name):
    return f", at {op_name}" if op_name else ""
