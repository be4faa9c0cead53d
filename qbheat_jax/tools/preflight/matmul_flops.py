"""Count the FLOPs of a jaxpr's matmuls and convolutions, to which a chip's peak rate refers."""

import collections

import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

from qbheat_jax.train import flops

PRIMITIVES = ("dot_general", "conv_general_dilated")


def each(jaxpr, times=1):
    """Yield (equation, number of executions) for every matmul and convolution; of a cond, those in one `flops.branch`."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name in PRIMITIVES:
            yield equation, times
        elif name == "cond":
            yield from each(flops.branch(equation), times)
        else:
            for inner in jaxprs_in_params(params):
                yield from each(inner, times * (params["length"] if name == "scan" else 1))


def by_type(jaxpr):
    """Return {dtype name: FLOPs}. The wider of the two operands decides the dtype, since it decides the hardware's path."""
    counts = collections.Counter()
    for equation, times in each(jaxpr):
        widest = max((v.aval.dtype for v in equation.invars[:2]), key=lambda d: jnp.dtype(d).itemsize)
        counts[jnp.dtype(widest).name] += times * flops.operations(equation)
    return dict(counts)
