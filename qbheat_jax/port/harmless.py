"""Types that `torch.load(weights_only=True)` may build from a checkpoint: plain data that training scripts save.

Building them runs no code of the file. Paths become pure paths, which cannot reach the disk. numpy arrays and scalars are
rebuilt from a plain type and bytes, because numpy would read object pointers from those bytes.
"""

import argparse
import collections
import datetime
import pathlib
import types

import numpy as np


class Array:
    """Stands for a numpy array while it is read; `array` holds the result."""

    array = None

    def __setstate__(self, state):
        _, shape, dtype, by_columns, data = state
        self.array = np.frombuffer(data, _plain(dtype)).reshape(shape, order="F" if by_columns else "C")


class Node:
    """Stands for a yacs config node, a dict with attributes."""

    def __new__(cls):
        return collections.OrderedDict()  # the only dict that torch.load gives attributes


def _array(*_):
    return Array()


def _scalar(dtype, data):
    return np.frombuffer(data, _plain(dtype))[0]


def _plain(dtype):
    """Return a type of numbers or text rebuilt from its name. Raise TypeError for any other."""
    if dtype.kind not in "biufcSU":
        raise TypeError(f"{dtype} is no type of numbers or text")
    return np.dtype(dtype.str)


def _dict(factory=None):
    """Stands for a defaultdict."""
    return {}


# Python 3.13 moved some to another module, whose name its files have.
_PATHS = {
    f"{module}.{name}": pathlib.PureWindowsPath if "Windows" in name else pathlib.PurePosixPath
    for module in ("pathlib", "pathlib._local")
    for name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
}
_NAMES = {
    "collections.defaultdict": _dict,
    **_PATHS,
    **{
        f"{module}.{kind.__name__}": kind for module in ("builtins", "__builtin__") for kind in (list, dict, set, tuple)
    },
    **{f"datetime.{name}": getattr(datetime, name) for name in ("datetime", "date", "time", "timedelta", "timezone")},
    "numpy.ndarray": Array,
    "yacs.config.CfgNode": Node,
    "mmengine.logging.history_buffer.HistoryBuffer": types.SimpleNamespace,
    **{
        f"{module}.multiarray.{name}": function
        for module in ("numpy.core", "numpy._core")
        for name, function in (("scalar", _scalar), ("_reconstruct", _array))
    },
}
_DTYPES = np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?SU"

# As `torch.serialization.safe_globals` takes them.
CLASSES = [
    argparse.Namespace,
    types.SimpleNamespace,
    np.dtype,
    *{type(np.dtype(code)) for code in _DTYPES},
    *((kind, name) for name, kind in _NAMES.items()),
]
