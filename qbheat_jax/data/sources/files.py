"""The one door to a user's files: folders are listed here, and files are read here, on a disk or in a bucket."""

import errno
import os
import stat

from etils import epath

from qbheat_jax.paths import remote

# What operating systems, archivers and network drives leave among a user's files.
SYSTEM_FOLDERS = {
    "__macosx", "@eadir", "@recycle", "#recycle", "#snapshot", "@tmp", "lost+found", "$recycle.bin", "recycler",
    "system volume information", "__pycache__",
}  # fmt: skip


def join(folder, name):
    """Return the path of `name` in `folder`."""
    return f"{folder.rstrip('/')}/{name}" if remote(folder) else os.path.join(folder, name)


def scan(folder):
    """List a folder, without hidden entries and those of SYSTEM_FOLDERS.

    Returns:
      (folders, files, others): sorted lists of names. `files` are regular files, links to them, and links whose target is
      missing, which are counted where they are read. `others` are pipes, sockets and devices.

    Raises:
      OSError: the folder cannot be listed.
    """
    found = {"folder": [], "file": [], "other": []}
    for name, kind in _entries(folder):
        if not name.startswith(".") and not (kind == "folder" and name.lower() in SYSTEM_FOLDERS):
            found[kind].append(name)
    return tuple(sorted(names) for names in found.values())


def _entries(folder):
    """Yield (name, "folder", "file" or "other")."""
    if remote(folder):
        for path in epath.Path(folder).iterdir():
            yield path.name, "folder" if path.is_dir() else "file"
        return
    # scandir knows what most entries are without asking the disk for each of a million files.
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
    """Return the bytes of a file, the first `most` of them where that is given.

    A pipe or a device is refused: reading it could take for ever.

    Raises:
      OSError: the file cannot be read.
    """
    if remote(path):
        with epath.Path(path).open("rb") as file:
            return file.read(most)
    # Without O_NONBLOCK a pipe that nobody writes to holds up the opening itself.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", os.fspath(path))
        with open(handle, "rb", closefd=False) as file:
            return file.read(most)
    finally:
        os.close(handle)


def there(path):
    """Return whether there is a file of that path, or a link to one."""
    return epath.Path(path).exists() if remote(path) else os.path.lexists(path)


def fingerprint(path):
    """Return bytes that change with a file: its size and time, `gone` where there is none, nothing for a bucket's."""
    if remote(path):
        return b""
    try:
        about = os.stat(path)
    except OSError:
        return b"gone"
    return f"{about.st_size} {about.st_mtime_ns}".encode()
