"""Count the least HBM traffic of a step on its jaxpr: the activations that the gradient needs.

The gradient needs the inputs of matmuls and convolutions, and the outputs of these, of reductions and of loops. All other
values can be recomputed from them elementwise, so a compiler need not store them.
"""

import dataclasses
import math

import jax
from jax.extend.core import Literal, jaxprs_in_params

from qbheat_jax.train import flops

# Primitives that return the same numbers in another shape or dtype.
_SAME = frozenset("convert_element_type copy expand_dims reshape squeeze transpose".split())
# Primitives whose outputs can be recomputed elementwise from their operands, or from a key alone.
_CHEAP = (
    _SAME
    | flops.ELEMENTWISE
    | frozenset(
        "and broadcast_in_dim concatenate eq ge gt iota le lt ne not or pad platform_index random_bits random_fold_in "
        "random_split random_unwrap random_wrap rev select_n slice split stop_gradient threefry2x32 xor".split()
    )
)
_LOOPS = ("scan", "while", "cond")


@dataclasses.dataclass(frozen=True, eq=False)
class _Node:
    """A value of the jaxpr.

    Attributes:
      made: Name of the primitive that made it; "input" for an argument, "literal" for a constant.
      operands: Tuple of `_Node`.
      aval: Abstract value with shape and dtype.
    """

    made: str
    operands: tuple = ()
    aval: object = None

    @property
    def bytes(self):
        """Size of the value."""
        shape, dtype = getattr(self.aval, "shape", ()), getattr(self.aval, "dtype", None)
        return math.prod(shape) * getattr(dtype, "itemsize", 0)


def activations(loss, params, *arguments):
    """Return the bytes of all activations that a gradient needs.

    Args:
      loss: Function (params, *arguments) -> (scalar, aux).
      params: Pytree of arrays or shapes, with respect to which the gradient is taken.
      *arguments: Pytrees of arrays or shapes.

    Returns:
      Bytes over all devices, without the arguments themselves.
    """

    def kept(params, *arguments):
        return jax.vjp(lambda p: loss(p, *arguments), params, has_aux=True)[1]  # its leaves are the stored values

    closed = jax.make_jaxpr(kept)(params, *arguments)
    entering = set()
    leaving = _nodes(closed.jaxpr, [_Node("input", aval=v.aval) for v in closed.jaxpr.invars], entering)
    sizes = {}
    for node in leaving:
        root, size = _same(node)
        found = {root: size} if root in entering else {r: r.bytes for r in _roots(root)}
        for root, size in found.items():
            sizes[root] = min(size, sizes.get(root, size))
    return sum(size for root, size in sizes.items() if root.made not in ("input", "literal"))


def _nodes(jaxpr, inputs, entering):
    """Return the nodes of a jaxpr's outputs, with inner calls inlined.

    The set `entering` collects the inputs of matmuls, convolutions, loops and all other primitives that are neither
    elementwise nor reductions.
    """
    known = {**{v: _Node("literal", aval=v.aval) for v in jaxpr.constvars}, **dict(zip(jaxpr.invars, inputs))}

    def node(v):
        return _Node("literal", aval=v.aval) if isinstance(v, Literal) else known[v]

    for equation in jaxpr.eqns:
        name, operands = equation.primitive.name, tuple(map(node, equation.invars))
        if equation.params.get("branches_platforms"):  # of the variants for platforms, one remains in the program
            inner, operands = [flops.branch(equation)], operands[1:]
        else:
            inner = [] if name in _LOOPS else list(jaxprs_in_params(equation.params))
        if len(inner) == 1:
            made = _nodes(getattr(inner[0], "jaxpr", inner[0]), operands, entering)
        else:
            made = [_Node(name, operands, v.aval) for v in equation.outvars]
            if name not in _CHEAP and name not in flops.REDUCTIONS:
                entering.update(_same(operand)[0] for operand in operands)
        known.update(zip(equation.outvars, made))
    return list(map(node, jaxpr.outvars))


def _same(node):
    """Return (the first node with the same numbers, their smallest size in bytes between that node and this one)."""
    size = node.bytes
    while node.made in _SAME:
        node = node.operands[0]
        size = min(size, node.bytes)
    return node, size


def _roots(node):
    """Return the set of nodes from which a node can be recomputed elementwise."""
    found, seen, waiting = set(), set(), [node]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.made in _CHEAP:
            waiting.extend(node.operands)
        else:
            found.add(node)
    return found
