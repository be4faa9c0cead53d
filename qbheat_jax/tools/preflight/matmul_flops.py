"""The matrix products and convolutions of a jaxpr, which are what a chip's peak is about."""

import collections

import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

from qbheat_jax.train import flops

PRODUCTS = ("dot_general", "conv_general_dilated")


def each(jaxpr, times=1):
    """(equation, how often it runs) of every product; of a cond, those of one `flops.branch`."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name in PRODUCTS:
            yield equation, times
        elif name == "cond":
            yield from each(flops.branch(equation), times)
        else:
            for inner in jaxprs_in_params(params):
                yield from each(inner, times * (params["length"] if name == "scan" else 1))


def by_type(jaxpr):
    """{type of the operands: operations}; both operands must be of 16 bits to be multiplied as such."""
    counts = collections.Counter()
    for equation, times in each(jaxpr):
        widest = max((v.aval.dtype for v in equation.invars[:2]), key=lambda d: jnp.dtype(d).itemsize)
        counts[jnp.dtype(widest).name] += times * flops.operations(equation)
    return dict(counts)
