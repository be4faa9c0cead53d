"""What training scripts save beside weights, and `torch.load(weights_only=True)` may build: no more than plain data.

Building any of it runs nothing of the file. A path becomes a pure one, which has no way to the disk.
"""

import argparse
import datetime
import pathlib
import types

import numpy as np

# Since Python 3.13 some live in a module of their own, and a file names them by it, whichever Python reads it.
_PATHS = {
    f"{module}.{name}": pathlib.PureWindowsPath if "Windows" in name else pathlib.PurePosixPath
    for module in ("pathlib", "pathlib._local")
    for name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
}


def _dict(factory=None):
    """What a defaultdict is read as."""
    return {}


_NAMES = {
    "collections.defaultdict": _dict,
    **_PATHS,
    **{
        f"{module}.{kind.__name__}": kind for module in ("builtins", "__builtin__") for kind in (list, dict, set, tuple)
    },
    **{f"datetime.{name}": getattr(datetime, name) for name in ("datetime", "date", "time", "timedelta", "timezone")},
    **{
        f"{module}.multiarray.{function.__name__}": function
        for module in ("numpy.core", "numpy._core")
        for function in (np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0])
    },
}
_DTYPES = np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?SU"

# As `torch.serialization.safe_globals` takes them.
CLASSES = [
    argparse.Namespace,
    types.SimpleNamespace,
    np.ndarray,
    np.dtype,
    *{type(np.dtype(code)) for code in _DTYPES},
    *((kind, name) for name, kind in _NAMES.items()),
]
