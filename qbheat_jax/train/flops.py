"""How many floating-point operations a jitted function asks for, counted from its jaxpr.

What the model asks for, not what a device does: nothing is compiled, so neither fusion nor the compiler's choice of an
algorithm changes the number.
"""

import math

import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

# One operation for each number that comes out.
ELEMENTWISE = frozenset(
    "abs acos acosh add add_any asin asinh atan atan2 atanh cbrt ceil clamp cos cosh cumlogsumexp cummax cummin cumprod "
    "cumsum digamma div erf erf_inv erfc exp exp2 expm1 floor integer_pow is_finite lgamma log log1p logistic max min mul "
    "neg nextafter pow rem round rsqrt sign sin sinh sqrt square sub tan tanh".split()
)
# One for each number that goes in.
REDUCTIONS = frozenset(
    "argmax argmin reduce_max reduce_min reduce_prod reduce_sum reduce_window_max reduce_window_min".split()
)


def count(jaxpr):
    """Operations of one call -> int. jaxpr: of `jax.make_jaxpr(f)(...)`, or `jax.jit(f).trace(...).jaxpr`.

    A multiply-add of a matrix product or a convolution counts two, the zeros of its padding included, those between the
    numbers of a dilated input not. Elementwise arithmetic counts one for each number that comes out, a reduction one for
    each that goes in. A scan counts as often as it runs; a while loop, whose number of turns is not known, once; of a
    cond one `branch`. Moving data, comparing, integers (random bits among them) and factorising matrices
    count nothing.

    >>> import jax
    >>> count(jax.make_jaxpr(lambda a, b: a @ b + 1)(jnp.zeros((2, 3)), jnp.zeros((3, 5))))
    70
    """
    return sum(map(operations, getattr(jaxpr, "jaxpr", jaxpr).eqns))


def operations(equation):
    """Operations of one equation of a jaxpr, as `count` counts them -> int."""
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(shape[d] for d in contracted)
    if name == "conv_general_dilated":
        # The kernel's input features are those of one group, which is what each output sums over.
        kernel = equation.invars[1].aval
        summed = kernel.size // kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        return 2 * equation.outvars[0].aval.size * summed // math.prod(params["lhs_dilation"])
    if name == "cond":
        return count(branch(equation))
    inner = sum(map(count, jaxprs_in_params(params)))
    if name == "scan":
        return params["length"] * inner
    if name in ELEMENTWISE:
        return _numbers(equation.outvars)
    if name in REDUCTIONS:
        return _numbers(equation.invars)
    if name in ("reduce_window_sum", "reduce_window"):
        return _numbers(equation.outvars) * math.prod(params["window_dimensions"])
    if name == "scatter-add":
        return _numbers(equation.invars[2:])
    return inner


def branch(equation):
    """Of a cond the branch that counts: the most expensive, or of forms for platforms the one for all that are not named."""
    branches, platforms = equation.params["branches"], equation.params.get("branches_platforms") or ()
    return branches[platforms.index(None)] if None in platforms else max(branches, key=count)


def _numbers(variables):
    """How many floating-point numbers the variables hold."""
    return sum(v.aval.size for v in variables if jnp.issubdtype(getattr(v.aval, "dtype", None), jnp.inexact))
