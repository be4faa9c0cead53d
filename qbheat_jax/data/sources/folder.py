"""The `folder:PATH` source: PATH/{train,val,test}/CLASS/*.jpg, or any folder of images without labels.

Splits are recognised by their usual names in any case (`Train`, `validation`, `train2017`), also one folder down
(`images/train`). Images are recognised by their extension, or by their first bytes if they have none. `notes` counts the
files that are skipped.
"""

import hashlib
import os
import re

import numpy as np
from etils import epath

from qbheat_jax import paths
from qbheat_jax.data import decode
from qbheat_jax.data.sources import base, files
from qbheat_jax.errors import UserError

# Names of splits; the groups are train, val and test.
SPLIT_NAME = re.compile(r"(train|training)|(val|valid|validation)|(test|testing)", re.IGNORECASE)
# COCO's folder names end in a year.
_YEAR = re.compile(r"[-_]?20\d\d$")
# Folders that look like a split with a nonstandard name.
_LIKE_SPLIT = re.compile(r"(train|val|valid|validation|test|dev|eval|holdout)(ing)?([-_ .\d].*|set|data|images)?", re.I)
# A folder with more subfolders than this holds classes, so they are not searched for splits.
_MANY = 8
_ACCEPTED = "jpg, png, webp and others that Pillow reads"


class Folder(base.Source):
    """Images in folders, listed once when the source is opened, and sorted by name.

    `class_names` are those of train, or of the first split if there is no train split. A class that only another split has
    gets label -1 there, and `check_labels` reports it.
    """

    def __init__(self, spec):
        given = spec.partition(":")[2]
        if not given:
            raise UserError(f"data.source='{spec}' names no folder: write folder:PATH")
        self.path = paths.expand(given, f"data.source='{spec}'")
        try:
            if not epath.Path(self.path).exists():
                raise UserError(f"data.source='{spec}': {self.path} does not exist")
            if not epath.Path(self.path).is_dir():
                raise UserError(f"data.source='{spec}': {self.path} is a file: it must be a folder of images")
            listing = _Listing(spec, self.path)
        except (OSError, ImportError, ValueError) as error:  # no permission; no bucket client or login
            raise UserError(f"data.source='{spec}': {self.path} cannot be read: {error}") from error
        self._files, self._classes, self.notes = listing.files, listing.classes, tuple(listing.notes())
        first = self._classes.get("train", next(iter(self._classes.values())))
        super().__init__(spec, {split: len(found) for split, found in self._files.items()}, first)
        number = {name: k for k, name in enumerate(self.class_names or ())}
        self._labels = {
            split: base.as_labels(np.repeat([number.get(name, -1) for name, _ in counts], [n for _, n in counts]))
            for split, counts in listing.counts.items()
        }

    def labels(self, split):
        return self._labels[self.split(split)]

    def classes(self, split):
        return self._classes[self.split(split)]

    def identity(self, split):
        """Return the cache key, which depends on each file's name and, on a disk, on its size and time."""
        digest = hashlib.sha256()
        for path in self._files[self.split(split)]:
            digest.update(os.fsencode(path) + b" " + files.fingerprint(path) + b"\n")
        return f"{super().identity(split)} {digest.hexdigest()}"

    def name(self, split, index):
        return self._files[self.split(split)][index]

    def paths(self, split):
        return None if paths.remote(self.path) else self._files[self.split(split)]

    def fetch(self, split, index):
        """Return (encoded bytes, label, path). Raise OSError if the file cannot be read."""
        split = self.split(split)
        path = self._files[split][index]
        return files.read(path), int(self._labels[split][index]), path

    def _labels_hint(self, split):
        return f": labels come from folders, {self.path}/{split}/CLASS/IMAGE"


class _Listing:
    """The contents of a folder.

    Attributes:
      files: {split: [path, ...]}, in a fixed order.
      classes: {split: class names or None}.
      counts: {split: [(class name or None, number of files), ...]}, in the order of `files`.
    """

    def __init__(self, spec, root):
        self.spec, self.files, self.classes, self.counts = spec, {}, {}, {}
        self._endings, self._scanned = decode.extensions(), {}
        self._passed, self._beside = {}, []  # {ending: [count, first path]}, [name, ...]
        root, named = self._root(root)
        if not named:
            self._add("train", None, [(None, root)])
        for split in sorted(named, key=("train", "val", "test").index):
            folder = files.join(root, named[split])
            names, here = self._scan(folder)
            if here and names:
                raise UserError(
                    f"data.source='{spec}': {folder} holds both images ({here[0]}, ...) and folders ({names[0]}, ...): put "
                    "all images into class folders, or none"
                )
            self._add(split, names or None, [(name, files.join(folder, name)) for name in names] or [(None, folder)])

    def notes(self):
        """Yield sentences on folders and files that were skipped."""
        if self._beside:
            yield f"data.source='{self.spec}': skipped beside the splits: {_few(self._beside)}"
        if self._passed:
            total = sum(count for count, _ in self._passed.values())
            yield f"data.source='{self.spec}': skipped {total:,} files that are not images: {self._kinds()}"

    def _kinds(self):
        kinds = sorted(self._passed.items(), key=lambda item: -item[1][0])
        return _few([f"{count:,} {ending} (such as {paths.printable(first)})" for ending, (count, first) in kinds])

    def _root(self, root):
        """Return (the folder that holds the splits, {split: folder name}), with {} if there are no splits."""
        folders, images = self._scan(root)
        named = self._splits(folders)
        if not named and len(folders) <= _MANY:
            inside = {name: found for name in folders if (found := self._splits(self._scan(files.join(root, name))[0]))}
            inside = {name: inside[name] for name in inside if name.lower() == "images"} or inside
            if len(inside) > 1:
                raise UserError(
                    f"data.source='{self.spec}': {_few(list(inside))} each hold splits: give one of them, such as "
                    f"folder:{files.join(root, next(iter(inside)))}"
                )
            for name, found in inside.items():
                self._beside += [other for other in folders if other != name]
                return files.join(root, name), found
            like = [name for name in folders if _LIKE_SPLIT.fullmatch(name)]
            if any(name.lower().startswith("train") for name in like):
                raise UserError(
                    f"data.source='{self.spec}': {_few(like)} in {root} look like splits, but accepted names are train, val "
                    "and test: rename them, or give one of them as PATH"
                )
        if named:
            self._beside += [name for name in folders if name not in named.values()]
            self._beside += [f"{len(images):,} images in {root} itself"] if images else []
        return root, named

    def _splits(self, folders):
        """Return {split: folder name} of the folders that are splits."""
        named = {}
        for name in folders:
            match = SPLIT_NAME.fullmatch(_YEAR.sub("", name))
            split = match and ("train", "val", "test")[match.lastindex - 1]
            if split in named:
                raise UserError(
                    f"data.source='{self.spec}' has two folders for the split '{split}', {named[split]} and {name}: keep one"
                )
            if split:
                named[split] = name
        return named

    def _add(self, split, classes, folders):
        """Add the images of [(class name or None, folder), ...] and of all folders below them to a split."""
        self.files[split], self.counts[split], self.classes[split] = [], [], classes
        for name, folder in folders:
            before = len(self.files[split])
            self._walk(folder, self.files[split])
            count = len(self.files[split]) - before
            if not count:
                where = f"{folder} and the folders below it hold no images ({_ACCEPTED})"
                if name is not None:
                    where = f"the class folder {folder} holds no images ({_ACCEPTED}): fill it or remove it"
                passed = f"; skipped: {self._kinds()}" if self._passed else ""
                raise UserError(f"data.source='{self.spec}': {where}{passed}")
            self.counts[split].append((name, count))

    def _walk(self, folder, found, above=()):
        """Append the paths of all images in `folder` and below; links back to a folder above are not followed."""
        real = folder if paths.remote(folder) else os.path.realpath(folder)
        if real in above:
            return
        folders, images = self._scan(folder)
        found += [files.join(folder, name) for name in images]
        for name in folders:
            self._walk(files.join(folder, name), found, (*above, real))

    def _scan(self, folder):
        """Return (folder names, image names) of a folder; other entries are counted, once."""
        if folder not in self._scanned:
            folders, names, others = files.scan(folder)
            images = []
            for name in names:
                ending = os.path.splitext(name)[1].lower()
                if ending in self._endings or (not ending and _is_image(files.join(folder, name))):
                    images.append(name)
                else:
                    self._pass_over(folder, name, paths.printable(ending) or "without an extension")
            for name in others:
                self._pass_over(folder, name, "pipes, sockets or devices")
            self._scanned[folder] = folders, images
        return self._scanned[folder]

    def _pass_over(self, folder, name, what):
        self._passed.setdefault(what, [0, files.join(folder, name)])[0] += 1


def _is_image(path):
    try:
        return decode.recognised(files.read(path, 16))
    except OSError:
        return False


def _few(items, most=5):
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
