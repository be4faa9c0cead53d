"""Names and layouts of PyTorch and flax. A table for each architecture maps its modules; the rest is here.

A table maps flax to PyTorch. Port and export share it: port reads every name that the model needs, export writes every name
that the model has.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import numpy as np

# Leaves of a module: flax's name and PyTorch's.
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
# Names in PyTorch that flax does not need.
IGNORED = r"(.*\.)?num_batches_tracked"


def _no_options(shapes):
    return {}


def _usual(encoder):
    return ""


def _no_signs(encoder):
    return ()


@dataclasses.dataclass(frozen=True)
class Table:
    """PyTorch's names for the modules of one family of encoders.

    Attributes:
      module: the linen class.
      rules: rows (regular expression, PyTorch's name), tried in order on a flax path without its collection. A row matches
        the path of a parameter (`encoder/tokens` -> `tokens.weight`) or of a module (`encoder/bn1` -> `bn1`). Where PyTorch
        has several parameters for one, the row has a tuple of names, of equal parts of the last axis; None stands for a part
        of zeros that PyTorch lacks.
      head: regular expression of the classifier's names in PyTorch.
      signs: function of an encoder that returns {name: shape} of a few parameters that distinguish it from its relatives.
      fields: {field: value} that registry entries must have; {} for all entries of the class.
      options: function of a file's {name: shape} that returns {config field: value} of the encoder, read from the file.
      dialects: {name: rules} of other releases that name the same modules differently.
      own_dialect: function of an encoder that returns the dialect it is exported in.
      dialect_signs: function of an encoder that returns the signs of files in its dialects, a tuple of dicts like `signs`.
      ignored: regular expression of names in PyTorch that flax does not need.
    """

    module: Any
    rules: tuple
    head: str
    signs: Callable
    fields: dict = dataclasses.field(default_factory=dict)
    options: Callable = _no_options
    dialects: dict = dataclasses.field(default_factory=dict)
    own_dialect: Callable = _usual
    dialect_signs: Callable = _no_signs
    ignored: str = IGNORED

    def fits(self, entry):
        """Return whether the table is for this entry of the registry."""
        return entry.module is self.module and all(entry.fields.get(k) == v for k, v in self.fields.items())

    def is_head(self, name):
        """Return whether a name of PyTorch belongs to the classifier."""
        return re.match(self.head, name) is not None

    def is_ignored(self, name):
        """Return whether flax does not need a name of PyTorch, such as a buffer."""
        return re.fullmatch(self.ignored, name) is not None

    def torch_names(self, paths, dialect=""):
        """Return {path: PyTorch's name} of leaves, whose paths begin with the collection (`params/encoder/conv1/kernel`).

        A leaf that PyTorch has in parts has a tuple of names, see `rules`.

        Raises:
          LookupError: the table has no rule for a path, or gives a name twice.
        """
        rules = self.dialects[dialect] if dialect else self.rules
        named = {path: _torch_name(path.split("/", 1)[1], rules) for path in paths}
        every = [name for names in named.values() for name in parts(names)]
        if len(set(every)) < len(every):
            raise LookupError(f"the table of {self.module.__name__} gives a name twice")
        return named

    def dialect_of(self, paths, names):
        """Return the dialect that knows most of a file's `names`; "" for the table's own."""
        names = set(names)

        def known(dialect):
            try:
                named = self.torch_names(paths, dialect)
            except LookupError:  # that release has no such parameter
                return -1
            return sum(name in names for part in named.values() for name in parts(part))

        return max(("", *self.dialects), key=known)


def _torch_name(path, rules):
    module, _, leaf = path.rpartition("/")
    for pattern, name in rules:
        if match := re.fullmatch(pattern, path):
            return _expand(match, name)
        if leaf in LEAVES and (match := re.fullmatch(pattern, module)):
            return _expand(match, name, f".{LEAVES[leaf]}")
    raise LookupError(f"no rule of the table is for {path}")


def _expand(match, name, ending=""):
    if isinstance(name, tuple):
        return tuple(part and match.expand(part) + ending for part in name)
    return match.expand(name) + ending


def parts(name):
    """Return the names of a leaf's parts that PyTorch has, given its name or tuple of names in a table."""
    return tuple(filter(None, name)) if isinstance(name, tuple) else (name,)


def taken_apart(path, array, name):
    """Return {PyTorch's name: array in PyTorch's layout} of a leaf."""
    if not isinstance(name, tuple):
        return {name: to_torch(path, array)}
    pieces = np.split(array, len(name), axis=-1)
    return {part: to_torch(path, piece) for part, piece in zip(name, pieces) if part}


def put_together(path, arrays, name, shape):
    """Return the leaf of `shape`, given a file's arrays; invert `taken_apart`. Axes of size 1 may differ in the file."""
    if not isinstance(name, tuple):
        return from_torch(path, arrays[name].reshape(torch_shape(path, shape)))
    piece = (*shape[:-1], shape[-1] // len(name))
    pieces = [put_together(path, arrays, part, piece) if part else None for part in name]
    zeros = np.zeros(piece, next(p for p in pieces if p is not None).dtype)
    return np.concatenate([zeros if p is None else p for p in pieces], axis=-1)


def torch_shapes(path, shape, name):
    """Return {PyTorch's name: shape in PyTorch} of a leaf of this shape."""
    if not isinstance(name, tuple):
        return {name: torch_shape(path, shape)}
    piece = torch_shape(path, (*shape[:-1], shape[-1] // len(name)))
    return {part: piece for part in parts(name)}


def same_shape(one, other):
    """Return whether two shapes differ in axes of size 1 alone.

    >>> same_shape((1, 1, 8), (8,)), same_shape((8, 3), (3, 8))
    (True, False)
    """
    return [n for n in one if n != 1] == [n for n in other if n != 1]


def to_torch(path, array):
    """Return a leaf in PyTorch's layout: kernels [kh, kw, in, out] -> [out, in, kh, kw], [in, out] -> [out, in]."""
    return np.transpose(array, _axes(path, array.ndim, {4: (3, 2, 0, 1), 2: (1, 0)}))


def from_torch(path, array):
    """Invert `to_torch`."""
    return np.transpose(array, _axes(path, array.ndim, {4: (2, 3, 1, 0), 2: (1, 0)}))


def torch_shape(path, shape):
    """Return the shape in PyTorch of a leaf of this shape."""
    return tuple(shape[axis] for axis in _axes(path, len(shape), {4: (3, 2, 0, 1), 2: (1, 0)}))


def _axes(path, ndim, kernels):
    return kernels.get(ndim, tuple(range(ndim))) if path.endswith("/kernel") else tuple(range(ndim))
