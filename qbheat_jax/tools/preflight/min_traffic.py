"""The least that a step moves through HBM: what its gradient needs, written once and read once, and the state likewise.

Counted on the jaxpr, before any compiler. What the gradient needs is what goes into products and convolutions, and what
comes out of them, of reductions and of loops; all else follows from these element by element, and no compiler need keep it.
"""

import dataclasses
import math

import jax
from jax.extend.core import Literal, jaxprs_in_params

from qbheat_jax.train import flops

# The same numbers, in another shape or type.
_SAME = frozenset("convert_element_type copy expand_dims reshape squeeze transpose".split())
# What follows element by element from its operands, or from nothing but a key.
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
    """One value: what made it, of what, and how large it is. `made` is "input" for an argument, "literal" for a number."""

    made: str
    operands: tuple = ()
    aval: object = None

    @property
    def bytes(self):
        shape, dtype = getattr(self.aval, "shape", ()), getattr(self.aval, "dtype", None)
        return math.prod(shape) * getattr(dtype, "itemsize", 0)


def activations(loss, params, *arguments):
    """Bytes, in all, of what the gradient of `loss(params, *arguments) -> (scalar, aux)` needs besides its arguments."""

    def kept(params, *arguments):
        return jax.vjp(lambda p: loss(p, *arguments), params, has_aux=True)[1]  # the pullback, whose leaves they are

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
    """The nodes of a jaxpr's outputs, calls within it opened. `entering` collects what goes into products and loops."""
    known = {**{v: _Node("literal", aval=v.aval) for v in jaxpr.constvars}, **dict(zip(jaxpr.invars, inputs))}

    def node(v):
        return _Node("literal", aval=v.aval) if isinstance(v, Literal) else known[v]

    for equation in jaxpr.eqns:
        name, operands = equation.primitive.name, tuple(map(node, equation.invars))
        if equation.params.get("branches_platforms"):  # forms for platforms, of which one is there in the end
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
    """(the node that holds the same numbers first, the fewest bytes that they take on the way from there)."""
    size = node.bytes
    while node.made in _SAME:
        node = node.operands[0]
        size = min(size, node.bytes)
    return node, size


def _roots(node):
    """The nodes that a node follows from element by element."""
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
