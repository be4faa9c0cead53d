"""The `masks:PATH` source: images, and PNGs whose pixels are numbers of classes.

Two layouts are recognised, that of PASCAL VOC and that of ADE20K:

    PATH/JPEGImages/NAME.jpg   PATH/SegmentationClass/NAME.png   PATH/ImageSets/Segmentation/{train,val,test}.txt
    PATH/images/{training,validation}/NAME.jpg   PATH/annotations/{training,validation}/NAME.png

In the second one the folder of the masks may also be `masks` or `labels`, and the splits may have their other usual names, as
of `folder:`. Images have any format that Pillow reads.

The names of the classes come from a file in PATH. Line k of `classes.txt`, counted from 0, is the name of value k; pixels whose
line is empty do not count. ADE20K's `objectInfo150.txt` names the values from 1 on; those of 0 do not count. Without a file,
VOC's layout has VOC's classes. 255, and in masks of 16 bits 65535, never count.

Images without a mask are left out and counted in `notes`. Masks that cannot be read, have another size than their image, or
hold a value without a name are bad files, as images that cannot be decoded.
"""

import hashlib
import os

import numpy as np
from etils import epath

from qbheat_jax import paths
from qbheat_jax.data import decode
from qbheat_jax.data.sources import base, files
from qbheat_jax.data.sources.folder import SPLIT_NAME
from qbheat_jax.data.specs.masks import IGNORED
from qbheat_jax.errors import UserError

CLASSES, ADE20K = "classes.txt", "objectInfo150.txt"
VOC = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
).split()
_SPLITS = ("train", "val", "test")
_FOLDERS = ("annotations", "masks", "labels")
_VALUES = 1 << 16
_UNNAMED = -1


class Masks(base.Source):
    """Images with masks, listed once when the source is opened. Whole images have no label."""

    def __init__(self, spec):
        given = spec.partition(":")[2]
        if not given:
            raise UserError(f"data.source='{spec}' names no folder: write masks:PATH")
        self.path = paths.expand(given, f"data.source='{spec}'")
        try:
            if not epath.Path(self.path).is_dir():
                raise UserError(f"data.source='{spec}': {self.path} is no folder")
            found, voc = _listed(spec, self.path)
            self.mask_names, self._numbers = _classes(spec, self.path, voc)
        except (OSError, ImportError) as error:  # no permission; no bucket client or login
            raise UserError(f"data.source='{spec}': {self.path} cannot be read: {error}") from error
        self._pairs, notes = {}, []
        for split in sorted(found, key=_SPLITS.index):
            self._pairs[split] = [(image, mask) for image, mask in found[split] if image and mask]
            notes += _missing(spec, split, found[split])
            if not self._pairs[split]:
                if split != "test":  # VOC publishes its test images without masks
                    raise UserError(notes[-1])
                del self._pairs[split]
        super().__init__(spec, {split: len(pairs) for split, pairs in self._pairs.items()}, None)
        self.notes = tuple(notes)

    def labels(self, split):
        return base.as_labels(np.full(self.splits[self.split(split)], -1))

    def paths(self, split):
        return None if paths.remote(self.path) else [image for image, _ in self._pairs[self.split(split)]]

    def identity(self, split):
        """Return the cache key, which depends on the names, sizes and times of all files, and on the classes."""
        digest = hashlib.sha256("\n".join(self.mask_names).encode() + self._numbers.tobytes())
        for path in (path for pair in self._pairs[self.split(split)] for path in pair):
            digest.update(os.fsencode(path) + b" " + files.fingerprint(path) + b"\n")
        return f"{super().identity(split)} {digest.hexdigest()}"

    def fetch(self, split, index):
        """Return (encoded bytes, label -1, path). Raise OSError if the file cannot be read."""
        path = self._pairs[self.split(split)][index][0]
        return files.read(path), -1, path

    def masks(self, split, index):
        """As `Source.masks`. Raise OSError or `decode.BadImage`, with the mask's path, if the file is bad."""
        path = self._pairs[self.split(split)][index][1]
        try:
            values = decode.decode_numbers(files.read(path))
            numbers = self._numbers[values]
            unnamed = values[numbers == _UNNAMED]
            if len(unnamed):
                raise decode.BadImage(f"value {unnamed[0]} is none of the {len(self.mask_names)} classes")
        except decode.BadImage as error:
            error.filename = path
            raise
        return numbers.astype(np.uint8)


def _listed(spec, root):
    """Return ({split: [(path of an image or None, path of its mask or None), ...]}, whether the layout is VOC's)."""
    folders, _, _ = files.scan(root)
    if {"JPEGImages", "SegmentationClass"} <= set(folders):
        return _voc(spec, root), True
    beside = [name for name in _FOLDERS if name in folders]
    if "images" in folders and beside:
        return _by_split(spec, root, beside[0]), False
    raise UserError(
        f"data.source='{spec}': {root} has neither JPEGImages/, SegmentationClass/ and ImageSets/, nor images/ and one of "
        f"{', '.join(f'{name}/' for name in _FOLDERS)} with a folder for each split"
    )


def _voc(spec, root):
    lists = files.join(files.join(root, "ImageSets"), "Segmentation")
    images = _stems(spec, files.join(root, "JPEGImages"))
    masks = _stems(spec, files.join(root, "SegmentationClass"), mask=True)
    found = {}
    for split in _SPLITS:
        path = files.join(lists, f"{split}.txt")
        if files.exists(path):
            lines = files.read(path).decode("utf-8-sig", "replace").splitlines()
            names = dict.fromkeys(line.split()[0] for line in lines if line.strip())
            found[split] = [(images.get(name), masks.get(name)) for name in names]
    if not found:
        raise UserError(f"data.source='{spec}': {lists} has none of the lists train.txt, val.txt and test.txt")
    return found


def _by_split(spec, root, beside):
    found, images, masks = {}, files.join(root, "images"), files.join(root, beside)
    for name in files.scan(images)[0]:
        match = SPLIT_NAME.fullmatch(name)
        if match is None:
            continue
        split = _SPLITS[match.lastindex - 1]
        if split in found:
            raise UserError(f"data.source='{spec}' has two folders for the split '{split}' in {images}: keep one")
        folder = files.join(masks, name)
        known = _stems(spec, folder, mask=True) if files.exists(folder) else {}
        found[split] = [(path, known.get(stem)) for stem, path in _stems(spec, files.join(images, name)).items()]
    if not found:
        raise UserError(f"data.source='{spec}': {images} has no folder of a split, such as training and validation")
    return found


def _stems(spec, folder, mask=False):
    """Return {name without its ending: path} of the images or, where `mask`, of the PNGs of a folder."""
    endings, found = {".png"} if mask else decode.extensions(), {}
    for name in files.scan(folder)[1]:
        stem, ending = os.path.splitext(name)
        if ending.lower() not in endings:
            continue
        if stem in found:
            raise UserError(f"data.source='{spec}': {folder} has two images {paths.printable(stem)}: keep one")
        found[stem] = files.join(folder, name)
    return found


def _missing(spec, split, pairs):
    """Return notes on the examples of a split that lack their image or their mask."""
    lost = sum(image is None for image, _ in pairs)
    bare = [image for image, mask in pairs if image and not mask]
    prefix, first = f"data.source='{spec}': {split}", paths.printable(bare[0]) if bare else ""
    notes = [f"{prefix} has no images"] if not pairs else []
    notes += [f"{prefix} lists {lost} images that are missing"] if lost else []
    return notes + ([f"{prefix} has {len(bare)} images without a mask (first: {first})"] if bare else [])


def _classes(spec, root, voc):
    """Return (names of the classes, int16 [65536]: the class of each value, IGNORED or _UNNAMED)."""
    for name, read in ((CLASSES, _lines), (ADE20K, _ade20k)):
        path = files.join(root, name)
        if files.exists(path):
            named = read(spec, path, files.read(path).decode("utf-8-sig", "replace").splitlines())
            break
    else:
        if not voc:
            raise UserError(
                f"data.source='{spec}': the classes have no names: write {root}/{CLASSES}, a line for each value"
            )
        named = dict(enumerate(VOC))
    values = [value for value, name in named.items() if name]
    names = [named[value] for value in values]
    if not 0 < len(names) <= IGNORED:
        raise UserError(f"data.source='{spec}': {path} names {len(names)} classes, and 1 to {IGNORED} are accepted")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"data.source='{spec}': {path} names two classes {paths.printable(twice)!r}")
    numbers = np.full(_VALUES, _UNNAMED, np.int16)
    numbers[[IGNORED, _VALUES - 1, *(value for value, name in named.items() if not name)]] = IGNORED
    numbers[values] = np.arange(len(values))
    return names, numbers


def _lines(spec, path, lines):
    """Return {value: name, empty where it does not count} of classes.txt."""
    return dict(enumerate(map(str.strip, lines[:_VALUES])))


def _ade20k(spec, path, lines):
    """Return the same of objectInfo150.txt, whose columns are parted by tabs: the first is the value, the last the names."""
    named = {0: ""}
    for line in lines[1:]:
        columns = line.split("\t")
        if not line.strip():
            continue
        if len(columns) < 2 or not columns[0].strip().isdecimal() or int(columns[0]) >= _VALUES:
            raise UserError(
                f"data.source='{spec}': {path} has a line {paths.printable(line)!r}: it takes VALUE, ..., NAMES"
            )
        named[int(columns[0])] = columns[-1].partition(",")[0].strip()
    return named
