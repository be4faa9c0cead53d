"""Paths as a user writes them: on the command line and in configs."""

import os

from qbheat_jax.errors import UserError


def remote(path):
    """Return whether a path is an address of a bucket, such as gs://bucket/folder."""
    return "://" in str(path)


def expand(path, name="a path"):
    """Return a user's path with `~` and `~user` expanded; an address of a bucket stays as it is.

    Args:
      path: str or os.PathLike.
      name: what the path is, for messages, such as `--workdir`.

    Raises:
      UserError: an empty path, one with a NUL byte, or the home of an unknown user.

    >>> expand("runs/first")
    'runs/first'
    """
    path = os.fspath(path)
    if not path.strip():
        raise UserError(f"{name} is empty: it takes a path")
    if "\0" in path:
        raise UserError(f"{name} holds a NUL byte, which no path can")
    if remote(path):
        return path
    expanded = os.path.expanduser(path)
    if expanded.startswith("~") and not os.path.exists(expanded):
        user = expanded.partition("/")[0]
        raise UserError(
            f"{name} {path}: {user} names the home folder of a user that is not known; write ./{user} for a file"
        )
    return expanded


def printable(name):
    """Return a name fit for one line of a log or page: control characters and undecodable bytes are escaped.

    >>> printable("a\\nb é")
    'a\\\\nb é'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(name))
