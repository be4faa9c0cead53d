"""The `coco:` source: images in a folder, their boxes in a JSON file in COCO's format.

    coco:IMAGES_DIR,ANNOTATIONS.json                                            train alone
    coco:IMAGES_DIR,ANNOTATIONS.json,IMAGES_DIR,ANNOTATIONS.json[,...]          train, val and, if there is a third pair, test

What is wrong with a file is refused where it may hide more, see `coco_file`. What can be repaired is, and is counted in one
line of the log: images without a file are left out, boxes are cut at their image's border, and boxes without a width or
height, or wholly outside, are dropped. `repairs` has the counts, `notes` says them.

EXIF may say that an image is to be turned. Its boxes are of the upright image where the annotated width and height are
those of the upright image, or of both; they are of the image as stored where only that has the annotated size, and such an
image is then not turned.
"""

import numpy as np

from qbheat_jax import paths
from qbheat_jax.data import annotations as annotations_lib
from qbheat_jax.data import decode
from qbheat_jax.data.sources import base, coco_file, files
from qbheat_jax.errors import UserError

SPLITS = ("train", "val", "test")
# Bytes at a file's head that are looked through for EXIF when the source is opened: it comes first.
_HEAD = 1 << 12


class Coco(base.Source):
    """Images and boxes; without a class for the whole image, so that `label` is -1.

    `repairs`: {split: {what: how many}}.
    """

    boxed = True

    def __init__(self, spec):
        parts = str(spec).partition(":")[2].split(",")
        if len(parts) % 2 or len(parts) > 2 * len(SPLITS) or not all(parts):
            raise UserError(
                f"data.source='{spec}' is not understood: write coco:IMAGES_DIR,ANNOTATIONS.json, once for train or more "
                "often for train, val and test, all with commas between"
            )
        self._folders, self._truth, self.repairs, named, notes = {}, {}, {}, {}, []
        for split, folder, path in zip(SPLITS, parts[::2], parts[1::2]):
            place = f"data.source='{spec}': {path}"
            self._folders[split] = paths.expand(folder, f"data.source='{spec}'")
            truth, repairs = coco_file.read(place, paths.expand(path, f"data.source='{spec}'"))
            self._truth[split], missing = _with_files(place, self._folders[split], truth)
            self.repairs[split] = {"images without a file": len(missing), **repairs}
            for what, count in self.repairs[split].items():
                if count:
                    first = f" (first: {paths.printable(missing[0])})" if what == "images without a file" else ""
                    notes.append(f"{place}: {count} {what}{first}")
            notes += _turned_images(place, self._folders[split], self._truth[split]["images"])
            named[split] = [(c["id"], c["name"]) for c in self._truth[split]["categories"]]
            if named[split] != named["train"]:
                raise UserError(f"{place} has other categories than {parts[1]}: both need the same ids and names")
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
        """Raises OSError where the file cannot be read."""
        split = self.split(split)
        path = files.join(self._folders[split], self._truth[split]["images"][index]["file_name"])
        return files.read(path), -1, path


def _with_files(place, folder, truth):
    """(the dict with those images alone whose file is there, the names of the others)."""
    there = _files(place, folder)
    images, missing = [], []
    for image in truth["images"]:
        name = image["file_name"]
        if not there(name) and there(name.replace("\\", "/")):  # as Windows writes it
            image = {**image, "file_name": name.replace("\\", "/")}
        if there(image["file_name"]):
            images.append(image)
        else:
            missing.append(name)
    if missing and not images:
        raise UserError(
            f"{place}: none of its {len(missing)} images is in {folder}, such as {paths.printable(missing[0])}"
        )
    kept = {image["id"] for image in images}
    annotations = [a for a in truth["annotations"] if a["image_id"] in kept]
    return {**truth, "images": images, "annotations": annotations}, missing


def _files(place, folder):
    """function(file name) -> whether it is there. One listing, since asking for each of many is slow."""
    try:
        names = set(files.scan(folder)[1])
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{place}: its folder of images, {folder}, does not exist") from error
    except OSError as error:
        raise UserError(
            f"{place}: its folder of images, {folder}, cannot be read: {error.strerror or error}"
        ) from error
    return lambda name: name in names or ("/" in name and files.there(files.join(folder, name)))


def _turned_images(place, folder, images):
    """A list with a sentence on the images that EXIF turns, and of which image their boxes are taken to be; [] without any.

    Nothing is looked at in a bucket, which would take a request for each image; the rule is the same.
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
        f"{place}: EXIF turns {upright + stored} images (first: {paths.printable(first)}): the boxes of {upright} are taken to "
        f"be of the upright image, those of {stored}, whose annotated size is only that of the stored one, of the image as "
        "stored"
    ]


def _turned(path, size):
    """None of an image that EXIF does not turn; otherwise the orientation by which it is turned, given its size."""
    try:
        head = files.read(path, _HEAD)
        if b"Exif" not in head and b"eXIf" not in head and not head.startswith((b"II*", b"MM\0*")):
            return None
        image = decode.open_header(files.read(path))
        return None if decode.orientation(image) == 1 else decode.turned(image, size)
    except (OSError, decode.BadImage):  # which is found out, and counted, where its pixels are asked for
        return None


def _boxes(truth):
    """A list of `boxes.Boxes`, one an image."""
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
