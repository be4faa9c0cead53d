"""Write small files atomically: a killed process leaves the old file or the new one, never a part."""

import contextlib
import os

from etils import epath

from qbheat_jax import paths


def write(path, content):
    """Write text (as UTF-8) or bytes to `path` through a temporary file beside it.

    Bucket objects are written directly, because buckets replace them atomically.

    Raises:
      OSError: the file system refuses the write; the old file is unchanged.
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
