"""The `folder:PATH` source: PATH/{train,val,test}/CLASS/*.jpg and so on, or any folder of images without labels."""

import hashlib
import os

from etils import epath

from qbheat_jax.data import base
from qbheat_jax.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_SPLITS = {"train": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}
_ACCEPTED = ", ".join(extension[1:] for extension in EXTENSIONS)


class Folder(base.Source):
    """Files are listed once, when the source is opened, and sorted by name, whatever order the disk gives.

    `class_names` are those of train (of the first split there is, without a train split); a class that only
    another split has gets label -1 there, and `check_labels` names it.
    """

    def __init__(self, spec):
        self.path = spec.partition(":")[2]
        if not self.path:
            raise UserError(f"data.source='{spec}' names no folder: write folder:PATH")
        self.path = self.path if _remote(self.path) else os.path.expanduser(self.path)
        try:
            if not epath.Path(self.path).exists():
                raise UserError(f"data.source='{spec}': {self.path} does not exist")
            if not epath.Path(self.path).is_dir():
                raise UserError(f"data.source='{spec}': {self.path} is a file, and a folder of images is needed")
            self._files, self._classes = _list_splits(spec, self.path)
        except (OSError, ImportError, ValueError) as error:  # No permission; no client for a bucket, or no login.
            raise UserError(f"data.source='{spec}': {self.path} cannot be read: {error}") from error
        first = self._classes.get("train", next(iter(self._classes.values())))
        super().__init__(spec, {split: len(files) for split, files in self._files.items()}, first)
        number = {name: k for k, name in enumerate(self.class_names or ())}
        self._labels = {
            split: base.as_labels([number.get(name, -1) for name, _ in files]) for split, files in self._files.items()
        }

    def labels(self, split):
        return self._labels[self.split(split)]

    def classes(self, split):
        return self._classes[self.split(split)]

    def identity(self, split):
        """With every file's name, and where it is on this machine its size and time: another file is another image."""
        digest = hashlib.sha256()
        for _, path in self._files[self.split(split)]:
            stat = None if _remote(path) else os.stat(path)
            digest.update(f"{path} {stat and (stat.st_size, stat.st_mtime_ns)}\n".encode())
        return f"{super().identity(split)} {digest.hexdigest()}"

    def fetch(self, split, index):
        """Raises OSError where the file cannot be read."""
        split = self.split(split)
        path = self._files[split][index][1]
        if _remote(path):
            data = epath.Path(path).read_bytes()
        else:
            with open(path, "rb") as handle:
                data = handle.read()
        return data, int(self._labels[split][index]), path

    def _labels_hint(self, split):
        return f": labels come from folders, {self.path}/{split}/CLASS/IMAGE"


def _list_splits(spec, root):
    """({split: [(class name or None, path), ...]}, {split: class names or None}), in a fixed order."""
    folders, _ = _scan(root)
    named = {}
    for folder in folders:
        split = _SPLITS.get(folder)
        if split in named:
            raise UserError(
                f"data.source='{spec}' has two folders for the split '{split}', {named[split]} and {folder}: keep one"
            )
        if split:
            named[split] = folder
    if not named:
        files = [(None, path) for path in _walk(root)]
        if not files:
            raise UserError(f"data.source='{spec}': no images ({_ACCEPTED}) in {root} or below it")
        return {"train": files}, {"train": None}
    files, classes = {}, {}
    for split in sorted(named, key=("train", "val", "test").index):
        files[split], classes[split] = _list_classes(spec, _join(root, named[split]))
    return files, classes


def _list_classes(spec, folder):
    names, here = _scan(folder)
    if here and names:
        raise UserError(
            f"data.source='{spec}': {folder} holds both images ({os.path.basename(here[0])}, ...) and folders "
            f"({names[0]}, ...): put every image into a class folder, or none"
        )
    if here:
        return [(None, path) for path in here], None
    if not names:
        raise UserError(f"data.source='{spec}': no images ({_ACCEPTED}) in {folder} or below it")
    files = []
    for name in names:
        found = list(_walk(_join(folder, name)))
        if not found:
            raise UserError(
                f"data.source='{spec}': the class folder {_join(folder, name)} holds no images ({_ACCEPTED}): "
                "fill it or remove it"
            )
        files.extend((name, path) for path in found)
    return files, names


def _scan(folder):
    """(sorted names of the folders, sorted paths of the images) directly in `folder`, hidden ones left out."""
    folders, images = [], []
    if _remote(folder):
        entries = ((path.name, path.is_dir()) for path in epath.Path(folder).iterdir())
    else:
        # scandir knows what is a folder without asking the disk for each of a million files.
        with os.scandir(folder) as listing:
            entries = [(entry.name, entry.is_dir()) for entry in listing]
    for name, is_folder in entries:
        if name.startswith("."):
            continue
        if is_folder:
            folders.append(name)
        elif name.lower().endswith(EXTENSIONS):
            images.append(_join(folder, name))
    return sorted(folders), sorted(images)


def _walk(folder, above=()):
    """Paths of all images in `folder` and below, in a fixed order; a link back to a folder above is not followed."""
    real = folder if _remote(folder) else os.path.realpath(folder)
    if real in above:
        return
    folders, images = _scan(folder)
    yield from images
    for name in folders:
        yield from _walk(_join(folder, name), (*above, real))


def _remote(path):
    return "://" in path


def _join(folder, name):
    return f"{folder.rstrip('/')}/{name}" if _remote(folder) else os.path.join(folder, name)
