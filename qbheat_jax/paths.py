"""Paths as users write them, on the command line and in configs."""

import os

from qbheat_jax.errors import UserError


def remote(path):
    """Return whether a path is a bucket address, such as gs://bucket/folder."""
    return "://" in str(path)


def expand(path, name="a path"):
    """Return a user's path with `~` and `~user` expanded; a bucket address is returned unchanged.

    Args:
      path: str or os.PathLike.
      name: what messages call the path, such as `--workdir`.

    Raises:
      UserError: the path is empty, contains a NUL byte, or names the home folder of an unknown user.

    >>> expand("runs/first")
    'runs/first'
    """
    path = os.fspath(path)
    if not path.strip():
        raise UserError(f"{name} is empty: it takes a path")
    if "\0" in path:
        raise UserError(f"{name} {path!r} contains a NUL byte: it takes a path without one")
    if remote(path):
        return path
    expanded = os.path.expanduser(path)
    if expanded.startswith("~") and not os.path.exists(expanded):
        user = expanded.partition("/")[0]
        raise UserError(
            f"{name} {path}: {user} is the home folder of an unknown user; write ./{user} for a file of that name"
        )
    return expanded


def printable(name):
    """Return a name fit for one line of a log or page: control characters and undecodable bytes are escaped.

    >>> printable("a\\nb é")
    'a\\\\nb é'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(name))
