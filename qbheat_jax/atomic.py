"""Write small files atomically, so that a killed process leaves no partial file."""

import contextlib
import os

from etils import epath

from qbheat_jax import paths


def write(path, content):
    """Write text (as UTF-8) or bytes beside `path`, then move them over it. Objects of a bucket are atomic by themselves.

    Raises:
      OSError: the disk refuses; the old content of `path` stays.
    """
    path, data = epath.Path(path), content.encode() if isinstance(content, str) else content
    if paths.remote(path):
        path.write_bytes(data)
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):  # a disk that has become read-only
            part.unlink(missing_ok=True)
