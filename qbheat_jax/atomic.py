"""Write small files atomically: a killed process leaves the old file or the new one, never a part."""

import contextlib
import os

from etils import epath

from qbheat_jax import paths


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path`, and rename it to `path` if the `with` block succeeds.

    Args:
      path: epath or pathlib path on a disk.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):  # the disk may have become read-only
            part.unlink(missing_ok=True)


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
    with replacing(path) as part:
        part.write_bytes(data)
