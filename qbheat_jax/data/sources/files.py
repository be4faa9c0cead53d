"""List folders and read files, on a disk or in a bucket; sources access users' files only through this module."""

import errno
import os
import stat

from etils import epath

from qbheat_jax.paths import remote

# Folders that operating systems, archivers and network drives create among a user's files.
SYSTEM_FOLDERS = {
    "__macosx", "@eadir", "@recycle", "#recycle", "#snapshot", "@tmp", "lost+found", "$recycle.bin", "recycler",
    "system volume information", "__pycache__",
}  # fmt: skip


def join(folder, name):
    """Return the path of `name` in `folder`."""
    return f"{folder.rstrip('/')}/{name}" if remote(folder) else os.path.join(folder, name)


def scan(folder):
    """List a folder, without hidden entries and SYSTEM_FOLDERS.

    Returns:
      (folders, files, others): sorted lists of names. `files` are regular files and links to them. Broken links are also
      in `files`, because reading them counts the error. `others` are pipes, sockets and devices.

    Raises:
      OSError: the folder cannot be listed.
    """
    found = {"folder": [], "file": [], "other": []}
    for name, kind in _entries(folder):
        if not name.startswith(".") and not (kind == "folder" and name.lower() in SYSTEM_FOLDERS):
            found[kind].append(name)
    return tuple(sorted(names) for names in found.values())


def _entries(folder):
    """Yield (name, "folder", "file" or "other") of each entry."""
    if remote(folder):
        for path in epath.Path(folder).iterdir():
            yield path.name, "folder" if path.is_dir() else "file"
        return
    # scandir knows the kind of most entries without a disk access for each.
    with os.scandir(folder) as listing:
        for entry in listing:
            yield entry.name, _kind(entry)


def _kind(entry):
    try:
        if entry.is_dir():
            return "folder"
        missing = entry.is_symlink() and not os.path.exists(entry.path)
        return "file" if missing or entry.is_file() else "other"
    except OSError:  # a link to itself
        return "file"


def read(path, most=-1):
    """Return the first `most` bytes of a file, or all of them for -1.

    Pipes and devices are refused, because reading them may never end.

    Raises:
      OSError: the file cannot be read, or is not a regular file.
    """
    if remote(path):
        with epath.Path(path).open("rb") as file:
            return file.read(most)
    # Without O_NONBLOCK, opening a pipe without a writer blocks.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", os.fspath(path))
        with open(handle, "rb", closefd=False) as file:
            return file.read(most)
    finally:
        os.close(handle)


def exists(path):
    """Return whether a path exists, or is a link, even a broken one."""
    return epath.Path(path).exists() if remote(path) else os.path.lexists(path)


def fingerprint(path):
    """Return bytes that change with a file: its size and time, `gone` if it is missing, b"" for a bucket's file."""
    if remote(path):
        return b""
    try:
        about = os.stat(path)
    except OSError:
        return b"gone"
    return f"{about.st_size} {about.st_mtime_ns}".encode()
