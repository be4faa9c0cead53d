"""The `coco:` source: images in a folder, and their boxes in a JSON file in COCO's format.

    coco:IMAGES_DIR,ANNOTATIONS.json                                            train only
    coco:IMAGES_DIR,ANNOTATIONS.json,IMAGES_DIR,ANNOTATIONS.json[,...]          train, val and, with a third pair, test

Errors that may hide others are refused, see `coco_file`. Repairable ones are repaired, and the log counts them. Images without
a file are left out, and boxes are cut at the image border. Boxes that have no width or height or lie outside the image are
dropped. `repairs` has the counts, `notes` the log lines.

EXIF may rotate an image. If the annotated size is that of the upright image, or of both, the boxes refer to the upright
image. If only the stored image has the annotated size, the boxes refer to the stored image, which is then not rotated.
"""

import numpy as np

from qbheat_jax import paths
from qbheat_jax.data import annotations as annotations_lib
from qbheat_jax.data import decode
from qbheat_jax.data.sources import base, coco_file, files
from qbheat_jax.errors import UserError

SPLITS = ("train", "val", "test")
# Bytes at the head of a file that are searched for EXIF when the source is opened; EXIF comes first.
_HEAD = 1 << 12


class Coco(base.Source):
    """Images with boxes; whole images have no class, so `label` is -1.

    Attributes:
      repairs: {split: {repair: count}}.
    """

    boxed = True

    def __init__(self, spec):
        parts = str(spec).partition(":")[2].split(",")
        if len(parts) % 2 or len(parts) > 2 * len(SPLITS) or not all(parts):
            raise UserError(
                f"data.source='{spec}' is not accepted: it takes coco:IMAGES_DIR,ANNOTATIONS.json, with a second pair for val "
                "and a third for test, separated by commas"
            )
        self._folders, self._truth, self.repairs, named, notes = {}, {}, {}, {}, []
        for split, folder, path in zip(SPLITS, parts[::2], parts[1::2]):
            prefix = f"data.source='{spec}': {path}"
            self._folders[split] = paths.expand(folder, f"data.source='{spec}'")
            truth, repairs = coco_file.read(prefix, paths.expand(path, f"data.source='{spec}'"))
            self._truth[split], missing = _with_files(prefix, self._folders[split], truth)
            self.repairs[split] = {"images without a file": len(missing), **repairs}
            for what, count in self.repairs[split].items():
                if count:
                    first = f" (first: {paths.printable(missing[0])})" if what == "images without a file" else ""
                    notes.append(f"{prefix}: {count} {what}{first}")
            notes += _turned_images(prefix, self._folders[split], self._truth[split]["images"])
            named[split] = [(c["id"], c["name"]) for c in self._truth[split]["categories"]]
            if named[split] != named["train"]:
                raise UserError(f"{prefix} has other categories than {parts[1]}: both need the same ids and names")
        super().__init__(
            spec, {s: len(t["images"]) for s, t in self._truth.items()}, [name for _, name in named["train"]]
        )
        self.notes = tuple(notes)
        self._boxes = {split: _boxes(truth) for split, truth in self._truth.items()}

    def boxes(self, split, index):
        return self._boxes[self.split(split)][index]

    def annotations(self, split):
        return self._truth[self.split(split)]

    def paths(self, split):
        split = self.split(split)
        folder, images = self._folders[split], self._truth[split]["images"]
        return None if paths.remote(folder) else [files.join(folder, image["file_name"]) for image in images]

    def fetch(self, split, index):
        """Return (encoded bytes, label -1, path). Raise OSError if the file cannot be read."""
        split = self.split(split)
        path = files.join(self._folders[split], self._truth[split]["images"][index]["file_name"])
        return files.read(path), -1, path


def _with_files(prefix, folder, truth):
    """Return (the annotations, limited to images whose file exists; the file names of the other images)."""
    there = _files(prefix, folder)
    images, missing = [], []
    for image in truth["images"]:
        name = image["file_name"]
        if not there(name) and there(name.replace("\\", "/")):  # Windows separators
            image = {**image, "file_name": name.replace("\\", "/")}
        if there(image["file_name"]):
            images.append(image)
        else:
            missing.append(name)
    if missing and not images:
        raise UserError(
            f"{prefix}: none of its {len(missing)} images is in {folder} (first: {paths.printable(missing[0])})"
        )
    kept = {image["id"] for image in images}
    annotations = [a for a in truth["annotations"] if a["image_id"] in kept]
    return {**truth, "images": images, "annotations": annotations}, missing


def _files(prefix, folder):
    """Return a function (file name) -> whether it exists. The folder is listed once, because separate checks are slow."""
    try:
        names = set(files.scan(folder)[1])
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{prefix}: its folder of images, {folder}, does not exist") from error
    except OSError as error:
        raise UserError(
            f"{prefix}: its folder of images, {folder}, cannot be read: {error.strerror or error}"
        ) from error
    return lambda name: name in names or ("/" in name and files.exists(files.join(folder, name)))


def _turned_images(prefix, folder, images):
    """Return a sentence on images that EXIF rotates, and on the image that their boxes refer to, as a list; [] if none.

    Images in a bucket are not checked, because each would take a request. The rule for their boxes is the same.
    """
    if paths.remote(folder):
        return []
    upright, stored, first = 0, 0, None
    for image in images:
        number = _turned(files.join(folder, image["file_name"]), (image["height"], image["width"]))
        if number is not None:
            upright, stored, first = upright + (number > 1), stored + (number == 1), first or image["file_name"]
    if not first:
        return []
    return [
        f"{prefix}: EXIF rotates {upright + stored} images (first: {paths.printable(first)}): the boxes of {upright} are "
        f"taken to refer to the upright image, and those of {stored} to the stored image, the only one with the annotated size"
    ]


def _turned(path, size):
    """Return the orientation by which an image of annotated `size` is rotated; None if EXIF does not rotate it."""
    try:
        head = files.read(path, _HEAD)
        if b"Exif" not in head and b"eXIf" not in head and not head.startswith((b"II*", b"MM\0*")):
            return None
        image = decode.open_header(files.read(path))
        return None if decode.orientation(image) == 1 else decode.applied_orientation(image, size)
    except (OSError, decode.BadImage):  # counted when its pixels are read
        return None


def _boxes(truth):
    """Return a list of `annotations.Boxes`, one per image."""
    number = {category["id"]: n for n, category in enumerate(truth["categories"])}
    own = {image["id"]: [] for image in truth["images"]}
    for annotation in truth["annotations"]:
        own[annotation["image_id"]].append(annotation)
    found = []
    for image in truth["images"]:
        size, inside = (image["height"], image["width"]), own[image["id"]]
        if not inside:
            found.append(annotations_lib.none(size))
            continue
        corners = np.array([a["bbox"] for a in inside], np.float32)
        corners[:, 2:] += corners[:, :2]
        classes = np.array([number[a["category_id"]] for a in inside], np.int32)
        crowd = np.array([bool(a["iscrowd"]) for a in inside])
        found.append(annotations_lib.Boxes(annotations_lib.clip(corners, size), classes, crowd, size))
    return found
