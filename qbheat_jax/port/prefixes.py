"""Find the prefix of an encoder's names in a file."""

import re

from qbheat_jax.errors import UserError
from qbheat_jax.models import registry
from qbheat_jax.port import tables

# Which of two encoders in a file is taken: a teacher before its student, a model before its average.
_TEACHER = re.compile(r"teacher")
_SECOND = re.compile(r"student|momentum|target|averag|(^|[._])ema([._]|$)|encoder_k|(^|_)key([._]|$)")
# An optimizer's moments have the parameters' names too.
_OPTIMIZER = re.compile(r"(^|\.)(optimizers?(_states?)?|exp_avg(_sq)?|momentum_buffer|square_avg|grads?)\.")


def find(shapes, arch=None):
    """Return the prefixes below which an encoder lies among {name: shape}; "" for names without a prefix.

    An architecture is recognised by its table's signs, a few names with shapes, so the encoder found may still not fit.

    Args:
      shapes: {name: shape} of the file.
      arch: the architecture. If None, or if it is not found, all of the registry are tried.
    """
    signs = [one for name in ([arch] if arch else registry.names()) for one in _signs(name)]
    found = [prefix for one in signs for prefix in _below(shapes, one)]
    if not found and arch:
        return find(shapes)
    return list(dict.fromkeys(found))


def choose(prefixes, source):
    """Return (the prefix to remove, a notice). Raise UserError where no prefix precedes the others."""
    ranked = sorted(prefixes, key=_rank)
    first, *others = ranked
    if not others:
        return first, f"{source}: prefix {first} removed"
    options = " or ".join(f"--prefix {prefix}" for prefix in others)
    if _rank(first) == _rank(others[0]):
        raise UserError(
            f"{source} holds {len(ranked)} encoders, below {' and '.join(ranked)}: pass --prefix {first} or {options}"
        )
    return first, f"{source} holds encoders below {' and '.join(ranked)}: {first} is taken ({options} takes the other)"


def below(arrays, prefix):
    """Return ({name without the prefix: array}, the names without that prefix)."""
    kept = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    return kept, [name for name in arrays if not name.startswith(prefix)]


def _signs(arch):
    try:
        table, encoder = tables.of(arch), registry.encoder(arch)
    except UserError:  # an encoder without a table
        return ()
    return (table.signs(encoder), *table.dialect_signs(encoder))


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
