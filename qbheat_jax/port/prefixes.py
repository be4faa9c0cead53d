"""Where in a file an encoder lies: the prefix below which an architecture's names begin."""

import re

from qbheat_jax.errors import UserError
from qbheat_jax.models import registry
from qbheat_jax.port import tables

# Of two encoders in a file: a teacher goes before its student, and a model before its average. The lower goes first.
_TEACHER = re.compile(r"teacher")
_SECOND = re.compile(r"student|momentum|target|averag|(^|[._])ema([._]|$)|encoder_k|(^|_)key([._]|$)")
# What an optimizer keeps by the parameters' names is no model.
_OPTIMIZER = re.compile(r"(^|\.)(optimizers?(_states?)?|exp_avg(_sq)?|momentum_buffer|square_avg|grads?)\.")


def find(shapes, arch=None):
    """{name: shape} -> prefixes below which an encoder lies; "" for names that need none.

    arch: the one looked for; None, or where there is none such: any of the registry's. An architecture is known by its
    table's signs, names with shapes, so what is found may still not fit.
    """
    signs = [_signs(name) for name in ([arch] if arch else registry.names())]
    found = [prefix for one in signs if one for prefix in _below(shapes, one)]
    if not found and arch:
        return find(shapes)
    return list(dict.fromkeys(found))


def choose(prefixes, source):
    """(the prefix to take off, a notice that says so) of one or more. UserError where none goes before the others."""
    ranked = sorted(prefixes, key=_rank)
    first, *others = ranked
    if not others:
        return first, f"{source}: the encoder lies below {first}, which is taken off"
    options = " or ".join(f"--prefix {prefix}" for prefix in others)
    if _rank(first) == _rank(others[0]):
        raise UserError(
            f"{source} holds {len(ranked)} encoders, below {' and '.join(ranked)}: pass --prefix {first} or {options}"
        )
    return first, f"{source} holds encoders below {' and '.join(ranked)}: {first} is taken ({options} takes the other)"


def below(arrays, prefix):
    """({name without the prefix: array}, the names that have none)."""
    kept = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    return kept, [name for name in arrays if not name.startswith(prefix)]


def _signs(arch):
    try:
        return tables.of(arch).signs(registry.encoder(arch))
    except UserError:  # an encoder that no table is for
        return {}


def _below(shapes, signs):
    first = next(iter(signs))
    for name, shape in shapes.items():
        prefix = name.removesuffix(first)
        if prefix == name or (prefix and not prefix.endswith(".")) or _OPTIMIZER.search(prefix):
            continue
        if shape == signs[first] and all(shapes.get(prefix + sign) == wanted for sign, wanted in signs.items()):
            yield prefix


def _rank(prefix):
    if _TEACHER.search(prefix):
        return 0
    return 2 if _SECOND.search(prefix) else 1
