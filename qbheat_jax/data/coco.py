"""The `coco:` source: images in a folder, their boxes in a JSON file in COCO's format.

    coco:IMAGES_DIR,ANNOTATIONS.json                                            train alone
    coco:IMAGES_DIR,ANNOTATIONS.json,IMAGES_DIR,ANNOTATIONS.json[,...]          train, val and, if there is a third pair, test

What is wrong with a file is refused where it may hide more: JSON that is torn or of another format, an id that is there
twice, a box of an unknown category or image, two splits with other categories. What can be repaired is, and is counted in
one line of the log: images without a file are left out, boxes are cut at their image's border, and boxes without a width or
height, or wholly outside, are dropped. `repairs` has the counts.
"""

import json
import logging
import math
import os

import numpy as np
from etils import epath

from qbheat_jax.data import base, boxes
from qbheat_jax.errors import UserError

_log = logging.getLogger("qbheat")

SPLITS = ("train", "val", "test")
# Beyond the border by less than this many pixels is rounding, and is not counted.
_ROUNDING = 1.0


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
        self._folders, self._truth, self.repairs, named = {}, {}, {}, {}
        for split, folder, path in zip(SPLITS, parts[::2], parts[1::2]):
            self._folders[split] = os.path.expanduser(folder)
            place = f"data.source='{spec}': {path}"
            self._truth[split], self.repairs[split] = _checked(place, self._folders[split], os.path.expanduser(path))
            named[split] = [(c["id"], c["name"]) for c in self._truth[split]["categories"]]
            if named[split] != named["train"]:
                raise UserError(f"{place} has other categories than {parts[1]}: both need the same ids and names")
        super().__init__(
            spec, {s: len(t["images"]) for s, t in self._truth.items()}, [name for _, name in named["train"]]
        )
        self._boxes = {split: _boxes(truth) for split, truth in self._truth.items()}

    def boxes(self, split, index):
        return self._boxes[self.split(split)][index]

    def annotations(self, split):
        return self._truth[self.split(split)]

    def fetch(self, split, index):
        """Raises OSError where the file cannot be read."""
        split = self.split(split)
        path = epath.Path(self._folders[split]) / self._truth[split]["images"][index]["file_name"]
        return path.read_bytes(), -1, str(path)


def _checked(place, folder, path):
    """(the file's dict, repaired and with the three lists sorted by id, {what was repaired: how many})."""
    truth = _read(place, path)
    images, categories, annotations = (
        _unique(place, truth, key, fields)
        for key, fields in (
            ("images", {"file_name": str, "width": int, "height": int}),
            ("categories", {"name": str}),
            ("annotations", {"image_id": int, "category_id": int, "bbox": list}),
        )
    )
    if not categories:
        raise UserError(f"{place} has no categories")
    there = _files(place, folder)
    missing = [image for image in images.values() if not there(image["file_name"])]
    counts = {"images without a file": len(missing)}
    if missing and len(missing) == len(images):
        raise UserError(f"{place}: none of its {len(images)} images is in {folder}, such as {missing[0]['file_name']}")
    left_out = {image["id"] for image in missing}
    kept = _repaired(place, images, categories, annotations.values(), counts)
    for what, count in counts.items():
        if count:
            first = f" (first: {missing[0]['file_name']})" if what == "images without a file" else ""
            _log.warning("%s: %d %s%s", place, count, what, first)
    return {
        "images": [image for image in images.values() if image["id"] not in left_out],
        "categories": list(categories.values()),
        "annotations": [a for a in kept if a["image_id"] not in left_out],
    }, counts


def _read(place, path):
    try:
        truth = json.loads(epath.Path(path).read_text())
    except OSError as error:
        raise UserError(f"{place} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{place} is torn or no JSON ({error}): get the file again") from error
    if not isinstance(truth, dict) or not all(
        isinstance(truth.get(key), list) for key in ("images", "annotations", "categories")
    ):
        raise UserError(f"{place} is not in COCO's format: it needs the lists images, annotations and categories")
    return truth


def _unique(place, truth, key, fields):
    """{id: entry}, ascending, of one of the lists. UserError for an entry without a field, and for an id twice."""
    found = {}
    for entry in truth[key]:
        have = entry if isinstance(entry, dict) else {}
        for field, kind in {"id": int, **fields}.items():
            if not isinstance(have.get(field), kind):
                raise UserError(f"{place}: an entry of {key} (id {have.get('id')!r}) has no {field}")
        if entry["id"] in found:
            raise UserError(f"{place}: id {entry['id']} of {key} is there twice")
        found[entry["id"]] = entry
    return {n: found[n] for n in sorted(found)}


def _files(place, folder):
    """function(file name) -> whether it is there. One listing, since asking for each of many is slow."""
    path = epath.Path(folder)
    if not path.is_dir():
        raise UserError(f"{place}: its folder of images, {folder}, does not exist")
    names = {entry.name for entry in path.iterdir()}
    return lambda name: name in names or ("/" in name and (path / name).exists())


def _repaired(place, images, categories, annotations, counts):
    """The annotations with boxes inside their images; what was done is added to `counts`."""
    cut, none, outside, kept = 0, 0, 0, []
    for annotation in annotations:
        name = f"box {annotation['id']}"
        if annotation["category_id"] not in categories:
            raise UserError(
                f"{place}: {name} is of category {annotation['category_id']}, which is none of its categories"
            )
        if annotation["image_id"] not in images:
            raise UserError(f"{place}: {name} is of image {annotation['image_id']}, which is none of its images")
        box = annotation["bbox"]
        if len(box) != 4 or not all(isinstance(x, (int, float)) and math.isfinite(x) for x in box):
            raise UserError(f"{place}: {name} has bbox={box!r}, not four numbers: left, top, width, height")
        x, y, width, height = box
        if width <= 0 or height <= 0:
            none += 1
            continue
        image = images[annotation["image_id"]]
        left, top = min(max(x, 0), image["width"]), min(max(y, 0), image["height"])
        right, bottom = min(max(x + width, 0), image["width"]), min(max(y + height, 0), image["height"])
        if right <= left or bottom <= top:
            outside += 1
            continue
        inside = [left, top, right - left, bottom - top]
        beyond = max(left - x, top - y, x + width - right, y + height - bottom)
        cut += beyond >= _ROUNDING
        whole = {"area": inside[2] * inside[3], "iscrowd": 0, **annotation}
        kept.append({**whole, "bbox": inside} if beyond > 0 else whole)
    counts["boxes cut at the border of their image"] = cut
    counts["boxes without a width or height dropped"] = none
    counts["boxes outside their image dropped"] = outside
    return kept


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
            found.append(boxes.none(size))
            continue
        corners = np.array([a["bbox"] for a in inside], np.float32)
        corners[:, 2:] += corners[:, :2]
        classes = np.array([number[a["category_id"]] for a in inside], np.int32)
        crowd = np.array([bool(a["iscrowd"]) for a in inside])
        found.append(boxes.Boxes(boxes.clip(corners, size), classes, crowd, size))
    return found
