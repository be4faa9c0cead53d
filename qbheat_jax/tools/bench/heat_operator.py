"""`bench heat`: time of the feature extrapolation, by propagator, number of placements, and number of cells."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from qbheat_jax.ops import heat, quarters
from qbheat_jax.tools.bench import section, timing

PLACEMENTS = quarters.PLACEMENT_SETS["corners_center"]  # the default of a run


def run(o):
    """Yield the sections: all propagators (forward; forward and backward), then each by placements and by cells.

    Args:
      o: A checked `options.Options`.
    """
    for backward in (False, True):
        setups = {p: (p, o.cells, PLACEMENTS, backward) for p in heat.PROPAGATORS}
        ratios = [(f"time of {p} over offset", p, "offset") for p in heat.PROPAGATORS[1:]]
        way = "forward and backward" if backward else "forward"
        title = f"extrapolation, {way}, batch {o.heat_batch}, C {o.width}, {o.cells} x {o.cells} cells, float32"
        yield _section(o, title, setups, ratios)
        jax.clear_caches()
    for propagator in heat.PROPAGATORS:
        yield _placements(o, propagator)
        yield _cells(o, propagator)
        jax.clear_caches()


def _placements(o, propagator):
    """Return the section of batches with a single placement against batches with all of them, in one program."""
    names = {count: f"{count} drawn" for count in (1, len(PLACEMENTS))}
    setups = {name: (propagator, o.cells, PLACEMENTS[:count], True) for count, name in names.items()}
    one, most = names.values()
    title = f"{propagator} by placements in the batch, forward and backward, {o.cells} x {o.cells} cells"
    return _section(o, title, setups, [(f"time with {most} over {one}", most, one)])


def _cells(o, propagator):
    """Return the section of grids with 0.5, 1 and 1.5 times the cells per side."""
    sides = [o.cells // 2, o.cells, o.cells * 3 // 2]
    names = {side: f"{side} x {side} cells" for side in sides}
    setups = {name: (propagator, side, PLACEMENTS, True) for side, name in names.items()}
    own = names[o.cells]
    ratios = [(f"time per cell of {names[side]} over {own}", names[side], own) for side in (sides[0], sides[2])]
    # Normalised by the number of cells: linear cost gives 1.
    shares = {name: (side / o.cells) ** 2 for side, name in names.items()}
    title = f"{propagator} by cells, forward and backward, batch {o.heat_batch}, C {o.width}"
    return _section(o, title, setups, ratios, shares)


def _section(o, title, setups, ratios, shares=None):
    """Time the programs and return the section.

    Args:
      o: A checked `options.Options`.
      title: Title of the section.
      setups: {name: arguments of `_call` after `o`}.
      ratios: [(words, name, other name), ...] of times, after division by `shares`.
      shares: {name: divisor of the time}; missing ones are 1.
    """
    limit = timing.Limit(o.limit)
    candidates = [timing.Candidate(name, timing.lazy(partial(_run, o, *setup))) for name, setup in setups.items()]
    figures = timing.alternate(candidates, o.rounds, o.seconds, limit)
    shares = shares or {}
    seconds = {name: [s / shares.get(name, 1.0) for s in figure["seconds"]] for name, figure in figures.items()}
    return section.make("heat", title, "", candidates, figures, timing.ratios(seconds, ratios), limit)


def _run(o, *setup):
    return timing.on_device(_call(o, *setup))


def _call(o, propagator, cells, drawn, backward):
    """Return a function that extrapolates a batch; with `backward` it also returns the gradients of params and batch.

    Args:
      o: A checked `options.Options`.
      propagator: Name in `heat.PROPAGATORS`.
      cells: Cells per side of the full grid.
      drawn: Tuple of placements that the batch cycles through.
      backward: bool.
    """
    choices = heat.Heat(propagator, init_scale=0.0 if propagator == "cosine" else 0.1)
    keys = jax.random.split(jax.random.key(0), 3)
    params = heat.init(keys[0], o.width, choices)
    visible = jax.random.normal(keys[1], (o.heat_batch, cells // 2, cells // 2, o.width))
    quarter = jnp.asarray(np.resize(drawn, o.heat_batch), jnp.int32)
    if not backward:
        return lambda: _forward(params, visible, quarter, choices)
    toward = jax.random.normal(keys[2], (o.heat_batch, cells, cells, o.width))
    return lambda: _backward(params, visible, quarter, toward, choices)


def _extrapolate(params, visible, quarter, choices):
    return heat.extrapolate(params, choices, visible, quarter, PLACEMENTS)


_forward = jax.jit(_extrapolate, static_argnames="choices")


def _pull(params, visible, quarter, toward, choices):
    """Return (extrapolated map [B, h, w, C], gradients of `params` and `visible`) for the map's gradient `toward`."""
    filled, pull = jax.vjp(lambda p, v: _extrapolate(p, v, quarter, choices), params, visible)
    return filled, pull(toward)


_backward = jax.jit(_pull, static_argnames="choices")
