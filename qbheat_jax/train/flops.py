"""Count the floating-point operations of a jitted function from its jaxpr.

Nothing is compiled, so the count is the model's: it is independent of fusion and of the compiler's choice of algorithms.
"""

import math

import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

# One operation per output number.
ELEMENTWISE = frozenset(
    "abs acos acosh add add_any asin asinh atan atan2 atanh cbrt ceil clamp cos cosh cumlogsumexp cummax cummin cumprod "
    "cumsum digamma div erf erf_inv erfc exp exp2 expm1 floor integer_pow is_finite lgamma log log1p logistic max min mul "
    "neg nextafter pow rem round rsqrt sign sin sinh sqrt square sub tan tanh".split()
)
# One operation per input number.
REDUCTIONS = frozenset(
    "argmax argmin reduce_max reduce_min reduce_prod reduce_sum reduce_window_max reduce_window_min".split()
)


def count(jaxpr):
    """Return the number of floating-point operations of one call.

    A multiply-add of a matrix product or convolution counts two, including padding zeros but not the zeros of a dilated
    input. Elementwise arithmetic counts one per output number, a reduction one per input number. A scan counts every
    iteration, a while loop (of unknown length) one iteration, and a cond one `branch`. Data movement, comparisons, integers
    (random bits included) and matrix factorisations count nothing.

    Args:
      jaxpr: `jax.make_jaxpr(f)(...)` or `jax.jit(f).trace(...).jaxpr`.

    Returns:
      int.

    >>> import jax
    >>> count(jax.make_jaxpr(lambda a, b: a @ b + 1)(jnp.zeros((2, 3)), jnp.zeros((3, 5))))
    70
    """
    return sum(map(operations, getattr(jaxpr, "jaxpr", jaxpr).eqns))


def operations(equation):
    """Return the number of operations of one equation, as counted by `count`."""
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(shape[d] for d in contracted)
    if name == "conv_general_dilated":
        # The kernel's input features are those of one group, over which each output sums.
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
    """Return the branch of a cond that counts: the default of platform-dependent branches, else the most expensive."""
    branches, platforms = equation.params["branches"], equation.params.get("branches_platforms") or ()
    return branches[platforms.index(None)] if None in platforms else max(branches, key=count)


def _numbers(variables):
    """Return how many floating-point numbers the variables hold."""
    return sum(v.aval.size for v in variables if jnp.issubdtype(getattr(v.aval, "dtype", None), jnp.inexact))
