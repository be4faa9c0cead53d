"""What training scripts save beside weights, and `torch.load(weights_only=True)` may build: no more than plain data.

Building any of it runs nothing of the file. A path becomes a pure one, which has no way to the disk; numpy's arrays and
scalars are made here of a plain type and bytes, since numpy itself would take pointers for objects out of them.
"""

import argparse
import datetime
import pathlib
import types

import numpy as np


class Array:
    """What a numpy array is read as, `array` once its state is set."""

    array = None

    def __setstate__(self, state):
        _, shape, dtype, by_columns, data = state
        self.array = np.frombuffer(data, _plain(dtype)).reshape(shape, order="F" if by_columns else "C")


def _array(*_):
    return Array()


def _scalar(dtype, data):
    return np.frombuffer(data, _plain(dtype))[0]


def _plain(dtype):
    """A type of numbers or text, made anew of its name."""
    if dtype.kind not in "biufcSU":
        raise TypeError(f"{dtype} is no type of numbers or text")
    return np.dtype(dtype.str)


def _dict(factory=None):
    """What a defaultdict is read as."""
    return {}


# Since Python 3.13 some live in a module of their own, and a file names them by it, whichever Python reads it.
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
