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


@dataclasses.dataclass(frozen=True)
class Table:
    """PyTorch's names for the modules of one family of encoders.

    Attributes:
      module: the linen class.
      rules: rows (regular expression, PyTorch's name), tried in order on a flax path without its collection. A row matches
        the path of a parameter (`encoder/tokens` -> `tokens.weight`) or of a module (`encoder/bn1` -> `bn1`).
      head: regular expression of the classifier's names in PyTorch.
      signs: function of an encoder that returns {name: shape} of a few parameters that distinguish it from its relatives.
      fields: {field: value} that registry entries must have; {} for all entries of the class.
      options: function of a file's {name: shape} that returns {config field: value} of the encoder, read from the file.
      dialects: {name: rules} of other releases that name the same modules differently.
      ignored: regular expression of names in PyTorch that flax does not need.
    """

    module: Any
    rules: tuple
    head: str
    signs: Callable
    fields: dict = dataclasses.field(default_factory=dict)
    options: Callable = _no_options
    dialects: dict = dataclasses.field(default_factory=dict)
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

        Raises:
          LookupError: the table has no rule for a path, or gives a name twice.
        """
        rules = self.dialects[dialect] if dialect else self.rules
        named = {path: _torch_name(path.split("/", 1)[1], rules) for path in paths}
        if len(set(named.values())) < len(named):
            raise LookupError(f"the table of {self.module.__name__} gives a name twice")
        return named

    def dialect_of(self, paths, names):
        """Return the dialect that knows most of a file's `names`; "" for the table's own."""
        names = set(names)
        return max(("", *self.dialects), key=lambda d: len(names & set(self.torch_names(paths, d).values())))


def _torch_name(path, rules):
    module, _, leaf = path.rpartition("/")
    for pattern, name in rules:
        if match := re.fullmatch(pattern, path):
            return match.expand(name)
        if leaf in LEAVES and (match := re.fullmatch(pattern, module)):
            return f"{match.expand(name)}.{LEAVES[leaf]}"
    raise LookupError(f"no rule of the table is for {path}")


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
