"""Small files that are whole at any time, whenever the process that writes them is killed."""

import contextlib
import os

from etils import epath

from qbheat_jax import paths


@contextlib.contextmanager
def replacing(path):
    """Give a path beside `path` to write to, which is moved over it at the end of the `with` block if all went well.

    path: epath or pathlib, on a disk.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):  # of a disk that has become read-only
            part.unlink(missing_ok=True)


def write(path, content):
    """Write text (as UTF-8) or bytes beside `path`, then move them over it; a bucket's objects are whole by themselves.

    Raises:
      OSError: the disk refuses; what was at `path` is left as it was.
    """
    path, data = epath.Path(path), content.encode() if isinstance(content, str) else content
    if paths.remote(path):
        path.write_bytes(data)
        return
    with replacing(path) as part:
        part.write_bytes(data)
