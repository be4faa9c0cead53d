"""Initialise a model from one random draw and without a forward pass.

A module's `init` draws each parameter separately and runs the model once. For Mobile-Former w720 this gives two hundred
random kernels, which XLA compiles in over a minute. Here one loop draws the bits of all parameters, and only operations
that parameters depend on are kept.
"""

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

_CHUNK = 2**18  # numbers drawn in one iteration


def in_one_draw(init):
    """Return `init(key, *arguments)` rewritten to draw all its random bits at once.

    The distributions are those of `init`, the numbers are not. They depend on the key and the order of `init`'s draws. Draws
    that are not 32 bits wide stay as they are.
    """

    def drawn(key, *arguments):
        closed, shapes = jax.make_jaxpr(init, return_shape=True)(key, *arguments)
        total = sum(_draws(closed.jaxpr))
        bits = _Slices(_bits(key, total)) if total else None
        values = _evaluate(closed.jaxpr, closed.consts, jax.tree.leaves((key, arguments)), bits)
        return jax.tree.unflatten(jax.tree.structure(shapes), values)

    return drawn


def _bits(key, total):
    """Return at least `total` random uint32. A loop compiles its body once, and never fuses it with consumers."""
    chunk = min(total, _CHUNK)
    rows = jax.lax.map(lambda n: jax.random.bits(jax.random.fold_in(key, n), (chunk,)), jnp.arange(-(-total // chunk)))
    return rows.reshape(-1)


class _Slices:
    """Consecutive parts of a vector; each call of `take` returns the next one."""

    def __init__(self, vector):
        self._vector, self._begin = vector, 0

    def take(self, shape, size):
        """Return the next `size` elements in the given shape."""
        part = self._vector[self._begin : self._begin + size]
        self._begin += size
        return part.reshape(shape)


def _is_draw(equation):
    return equation.primitive.name == "random_bits" and equation.params["bit_width"] == 32


def _inner(equation):
    """Return the closed jaxpr of a jitted call, which is evaluated in place; None for other equations."""
    return equation.params["jaxpr"] if equation.primitive.name in ("jit", "pjit") else None


def _live(jaxpr):
    """Return the equations that the outputs depend on, in order. A draw depends on nothing."""
    needed = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    live = []
    for equation in reversed(jaxpr.eqns):
        if needed.intersection(equation.outvars):
            live.append(equation)
            if not _is_draw(equation):
                needed.update(v for v in equation.invars if not isinstance(v, Literal))
    return live[::-1]


def _draws(jaxpr):
    """Yield the sizes of the draws among the live equations, in order."""
    for equation in _live(jaxpr):
        if _is_draw(equation):
            yield equation.outvars[0].aval.size
        elif (inner := _inner(equation)) is not None:
            yield from _draws(inner.jaxpr)


def _evaluate(jaxpr, consts, arguments, bits):
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments]))

    def value(v):
        return v.val if isinstance(v, Literal) else known[v]

    for equation in _live(jaxpr):
        if _is_draw(equation):
            aval = equation.outvars[0].aval
            values = [bits.take(aval.shape, aval.size)]
        elif (inner := _inner(equation)) is not None:
            values = _evaluate(inner.jaxpr, inner.consts, map(value, equation.invars), bits)
        else:
            params = equation.primitive.get_bind_params(equation.params)
            values = equation.primitive.bind(*map(value, equation.invars), **params)
            values = values if equation.primitive.multiple_results else [values]
        known.update(zip(equation.outvars, values))
    return [value(v) for v in jaxpr.outvars]
