"""Exponential moving averages: teachers and key encoders."""

import jax
import jax.numpy as jnp

from qbheat_jax.methods.common.encoding import variables


def ema_update(slow, fast, momentum):
    """Return momentum * slow + (1 - momentum) * fast of two trees of float32."""
    return jax.tree.map(lambda s, f: momentum * s + (1 - momentum) * f, slow, fast)


def with_copies(given, parts, prefix):
    """Return variables whose state has a copy of each part under its name behind `prefix`.

    Args:
      given: {"params": {part: tree}, "batch_stats": {part: tree}}; parts that it lacks are left out.
      parts, prefix: As of `followed`.
    """
    params, stats = given["params"], dict(given.get("batch_stats", {}))
    for part in [part for part in parts if part in params]:
        # A copy: the step donates the state, and no buffer may be donated twice.
        stats[prefix + part] = jax.tree.map(jnp.copy, variables(params, stats, part))
    return {"params": params, "batch_stats": stats}


def early(steps):
    """Return the largest momentum of running statistics at a step, so that they forget where they began, (0, 1)."""
    return (1.0 + steps) / (10.0 + steps)


def followed(params, state, parts, prefix, momentum):
    """Return the state with the copies of `parts` moved towards them by `momentum`.

    Running statistics are copied as averages too, so that a copy normalises by averages alone (EMAN, arXiv 2101.08482). Their
    momentum is at most `early`. state["steps"]: int32, the steps done.
    """
    params, steps = jax.lax.stop_gradient(params), state["steps"].astype(jnp.float32)
    by = {"params": momentum, "batch_stats": jnp.minimum(momentum, early(steps))}
    moved = {}
    for part in parts:
        slow, fast = state[prefix + part], variables(params, state, part)
        moved[prefix + part] = {name: ema_update(slow[name], fast[name], by[name]) for name in slow}
    return {**state, **moved}
