"""`bench heat`: what extrapolating the features costs, by propagator, placements drawn and number of cells."""

import jax
import jax.numpy as jnp
import numpy as np

from qbheat_jax import heat, quarters
from qbheat_jax.bench import section, timing

PLACEMENTS = quarters.PLACEMENT_SETS["corners_center"]  # a run's default


def run(o):
    """Yields sections: all propagators forward, forward and backward; each over placements drawn and over cells."""
    for backward in (False, True):
        figures, candidates = _time(o, {p: _call(o, p, o.cells, PLACEMENTS, backward) for p in heat.PROPAGATORS})
        ratios = [
            (f"cost of {p} over offset", timing.ratio(figures[p]["seconds"], figures["offset"]["seconds"]))
            for p in heat.PROPAGATORS[1:]
        ]
        way = "forward and backward" if backward else "forward"
        title = f"extrapolation, {way}, batch {o.heat_batch}, C {o.width}, {o.cells} x {o.cells} cells, float32"
        yield section.make("heat", title, "", candidates, figures, ratios)
        jax.clear_caches()
    for propagator in heat.PROPAGATORS:
        yield _placements(o, propagator)
        yield _cells(o, propagator)
        jax.clear_caches()


def _placements(o, propagator):
    """One program, whose batches hold one placement alone or all of them."""
    drawn = {count: PLACEMENTS[:count] for count in (1, len(PLACEMENTS))}
    names = {count: f"{count} drawn" for count in drawn}
    figures, candidates = _time(o, {names[n]: _call(o, propagator, o.cells, drawn[n], True) for n in drawn})
    most = names[len(PLACEMENTS)]
    cost = timing.ratio(figures[most]["seconds"], figures[names[1]]["seconds"])
    title = f"{propagator} by placements in the batch, forward and backward, {o.cells} x {o.cells} cells"
    return section.make("heat", title, "", candidates, figures, [(f"cost with {most} over 1 drawn", cost)])


def _cells(o, propagator):
    """Grids of a half, one and one and a half times the cells a side."""
    sides = [o.cells // 2, o.cells, o.cells * 3 // 2]
    names = {side: f"{side} x {side} cells" for side in sides}
    figures, candidates = _time(o, {names[n]: _call(o, propagator, n, PLACEMENTS, True) for n in sides})
    own, ratios = names[o.cells], []
    for side in (sides[0], sides[2]):
        # Of equal numbers of cells: what is linear gives 1.
        share = (side / o.cells) ** 2
        seconds = [s / share for s in figures[names[side]]["seconds"]]
        ratios.append((f"cost a cell of {names[side]} over {own}", timing.ratio(seconds, figures[own]["seconds"])))
    title = f"{propagator} by cells, forward and backward, batch {o.heat_batch}, C {o.width}"
    return section.make("heat", title, "", candidates, figures, ratios)


def _time(o, calls):
    candidates = [timing.Candidate(name, timing.repeated(call)) for name, call in calls.items()]
    return timing.alternate(candidates, o.rounds, o.seconds), candidates


def _call(o, propagator, cells, drawn, backward):
    """Function that extrapolates a batch and, with `backward`, takes the gradient of all that it depends on."""
    choices = heat.Heat(propagator, init_scale=0.1)
    keys = jax.random.split(jax.random.key(0), 3)
    params = heat.init(keys[0], o.width, choices)
    visible = jax.random.normal(keys[1], (o.heat_batch, cells // 2, cells // 2, o.width))
    quarter = jnp.asarray(np.resize(drawn, o.heat_batch), jnp.int32)
    if not backward:
        return lambda: jax.block_until_ready(_forward(params, visible, quarter, choices))
    toward = jax.random.normal(keys[2], (o.heat_batch, cells, cells, o.width))
    return lambda: jax.block_until_ready(_backward(params, visible, quarter, toward, choices))


def _extrapolate(params, visible, quarter, choices):
    return heat.extrapolate(params, choices, visible, quarter, PLACEMENTS)


_forward = jax.jit(_extrapolate, static_argnames="choices")


def _pull(params, visible, quarter, toward, choices):
    """(the extrapolated map, gradients of `params` and `visible`) where that of the map is `toward`."""
    filled, pull = jax.vjp(lambda p, v: _extrapolate(p, v, quarter, choices), params, visible)
    return filled, pull(toward)


_backward = jax.jit(_pull, static_argnames="choices")
