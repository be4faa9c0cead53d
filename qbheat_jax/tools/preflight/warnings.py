"""Warnings about a step's likely performance problems, each with the figure behind it."""

import math

import jax

from qbheat_jax import pytree
from qbheat_jax.train import sharding

MIB = 2**20
MIN_BYTES = 64 * MIB  # per device and step; less traffic has no visible cost
MIN_WAIT = 1e-4  # seconds
LAUNCH = 5e-6  # seconds; for shorter kernels, the launch takes as long as the kernel


def of_step(step, traced, matmul_flops, target):
    """Return the warnings about a step before its compilation.

    Args:
      step: A `compile.Step`.
      traced: Result of `step.trace()`.
      matmul_flops: {dtype name: FLOPs} of `matmul_flops.by_type`.
      target: A `topology.Topology`.

    Returns:
      List of strings.
    """
    lines = [_unsplit_parameters(step), _recompiles(step, traced)]
    if target.kind != "cpu":
        lines.append(_wide_dtypes(step, matmul_flops))
    if target.tpu:
        lines.append(_small_batch(step))
    return [line for line in lines if line]


def of_program(module, floors, target, mesh):
    """Return the warnings about a compiled step.

    Args:
      module: The step's `hlo.Module`.
      floors: {name: seconds} of `bounds.floors`, or empty.
      target: A `topology.Topology`.
      mesh: {axis: size}.

    Returns:
      List of strings.
    """
    lines = [_padding(module), _slow_interconnect(module, floors), _large_gather(module), _batch_gathered(module, mesh)]
    lines.append(_recomputed(module))
    if target.gpu and floors:
        lines.append(_short_kernels(module, floors))
    return [*filter(None, lines), *_loops(module)]


def _wide_dtypes(step, matmul_flops):
    wide = sum(n for name, n in matmul_flops.items() if name not in ("bfloat16", "float16"))
    share = wide / max(1, sum(matmul_flops.values()))
    if step.config.dtype == "float32":
        return "dtype is float32, whose matmul operands take twice the bytes of bfloat16 (--config.dtype bfloat16)"
    if share > 0.05:
        return f"{share:.0%} of the matmul FLOPs have float32 operands, although dtype is bfloat16"


def _unsplit_parameters(step):
    """Warn of parameters that fsdp could not split."""
    size = step.mesh.shape["fsdp"]
    if size == 1:
        return None
    leaves = jax.tree.leaves(step.state.params)
    whole = [x for x in leaves if x.sharding.is_fully_replicated and x.size >= sharding.SMALLEST_SPLIT]
    share = pytree.count(whole) / step.parameters
    if share > 0.1:
        largest = max(whole, key=lambda x: x.size)
        return (
            f"{share:.0%} of the parameters are replicated on every device, because none of their dimensions is a multiple "
            f"of mesh.fsdp={size}; the largest has shape {tuple(largest.shape)}"
        )


def _recompiles(step, traced):
    """Warn of a state whose types change in a step, since the second step then compiles again."""
    if step.inference:
        return None
    differ = [
        name
        for (name, before), after in zip(pytree.names(step.state), jax.tree.leaves(traced.out_info[0]))
        if (before.shape, before.dtype, before.weak_type)
        != (after.shape, after.dtype, getattr(after, "weak_type", False))
    ]
    if differ:
        return f"the second step compiles again: the step changes the type of {len(differ)} arrays, such as {differ[0]}"


def _small_batch(step):
    local = step.config.batch_size // (step.mesh.shape["data"] * step.mesh.shape["fsdp"])
    if local < 8:
        return f"{local} images per device: a TPU's registers hold 8 rows, so a batch below 8 leaves some of them empty"


def _padding(module):
    moved, padding = module.traffic()
    found = module.most_padded()
    if moved > MIN_BYTES and padding > 0.15 * moved and found:
        array, op_name = found
        return (
            f"{padding / moved:.0%} of the HBM traffic is tile padding; the worst array is {array.dtype}{list(array.shape)}, "
            f"whose {array.bytes / MIB:.0f} MiB take {array.padded / MIB:.0f} MiB{_at(op_name)}"
        )


def _slow_interconnect(module, floors):
    wait, others = floors.get("interconnect", 0.0), [v for k, v in floors.items() if k != "interconnect"]
    if wait < MIN_WAIT or wait < 0.5 * max(others):
        return None
    collectives = module.collectives()
    kind, most = max(collectives.items(), key=lambda item: item[1].sent)
    share = most.sent / sum(c.sent for c in collectives.values())
    largest = max((c for c in module.each_collective() if c[1] == kind), key=lambda c: c[2].sent)
    return (
        f"the interconnect needs {wait * 1e3:.1f} ms per step, the slower of arithmetic and memory "
        f"{max(others) * 1e3:.1f} ms; {kind} sends {share:.0%} of the bytes, the largest one{_at(largest[0])}"
    )


def _large_gather(module):
    gathers = [c for c in module.each_collective() if c[1] == "all-gather"]
    total = sum(c[2].bytes for c in gathers)
    largest = max(gathers, key=lambda c: c[2].bytes, default=None)
    if largest and len(gathers) > 1 and largest[2].bytes > 0.5 * total and largest[2].bytes > MIN_BYTES:
        return (
            f"one all-gather brings {largest[2].bytes / MIB:.0f} of {total / MIB:.0f} MiB{_at(largest[0])}, and holds all "
            "of it in memory at once"
        )


def _batch_gathered(module, mesh):
    """Warn of activations that every device gathers, although the mesh only splits the batch."""
    gathers = [c for c in module.each_collective() if c[1] == "all-gather"]
    total = sum(c[2].bytes for c in gathers)
    if mesh["data"] == math.prod(mesh.values()) and total > MIN_BYTES:
        largest = max(gathers, key=lambda c: c[2].bytes)
        return (
            f"{len(gathers)} all-gathers bring {total / MIB:.0f} MiB of the other devices' batch to each device, which then "
            f"computes on the whole batch; see the largest all-gather{_at(largest[0])}"
        )


def _recomputed(module):
    instructions, moved = module.recomputed()
    share = moved / max(1, module.traffic()[0])
    if share > 0.01:
        return (
            f"memory is short: the compiler recomputes {instructions} results to save it, which is {share:.0%} of the HBM "
            "traffic; a smaller batch may be faster"
        )


def _short_kernels(module, floors):
    launches, seconds = sum(module.launches().values()), max(floors.values())
    if seconds < launches * LAUNCH:
        return (
            f"{launches:,} kernels in {seconds * 1e3:.2f} ms are {seconds / launches * 1e6:.2g} us each; launching them takes "
            "about as long, so the step will be slower; a larger batch makes the kernels longer"
        )


def _loops(module):
    lines = [
        f"a gather or scatter became a sequential loop of {turns} iterations{_at(op_name)}"
        for turns, op_name in module.serial_gathers()
        if turns >= 8
    ]
    unknown = module.unknown_loops()
    if unknown:
        lines.append(f"{unknown} loops have an unknown number of iterations; bytes and collectives count them once")
    return lines


def _at(op_name):
    return f", at {op_name}" if op_name else ""
