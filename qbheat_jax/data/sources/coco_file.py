"""Read an annotation file in COCO's format; check and normalise every value.

Unambiguous variants are accepted: numbers or ids as text or with a decimal point ("64.0"), `iscrowd` null or true, a missing
or invalid `area`, and a byte-order mark. Repairable errors are repaired and counted. Other errors are refused, with the
image's name.
"""

import json
import math

from qbheat_jax.data.sources import files
from qbheat_jax.errors import UserError
from qbheat_jax.paths import printable

# Boxes that exceed the border by fewer pixels than this are rounding errors, and are not counted.
_ROUNDING = 1.0


def read(prefix, path):
    """Return the file's dict {"images", "categories", "annotations"}, each sorted by id and with the fields below only.

    images: id, file_name str, width, height int. categories: id, name str. annotations: id (from 1), image_id, category_id,
    bbox [left, top, width, height] float within the image, area float, iscrowd 0 or 1. Ids of images and categories
    are the file's own: int, or str if they are not whole numbers.

    Args:
      prefix: start of every message.
      path: path of the file, on a disk or in a bucket.

    Returns:
      (dict, counts); counts is {repair: number of times}.

    Raises:
      UserError: the file cannot be read, is not in COCO's format, or holds an invalid value.
    """
    truth = _lists(prefix, path)
    images = _by_id(prefix, "images", truth["images"], _image)
    categories = _by_id(prefix, "categories", truth["categories"], _category)
    if not categories:
        raise UserError(f"{prefix} has no categories")
    names = [category["name"] for category in categories.values()]
    for category in categories.values():  # some tools give two categories the same name
        if names.count(category["name"]) > 1:
            category["name"] += f" ({category['id']})"
    annotations, counts = _annotations(prefix, truth["annotations"], images, categories)
    return {
        "images": list(images.values()),
        "categories": list(categories.values()),
        "annotations": annotations,
    }, counts


def _lists(prefix, path):
    try:
        truth = json.loads(files.read(path).decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{prefix} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{prefix} is incomplete or not JSON ({error}): get the file again") from error
    if not isinstance(truth, dict) or not all(
        isinstance(truth.get(key), list) for key in ("images", "annotations", "categories")
    ):
        raise UserError(f"{prefix} is not in COCO's format: it needs the lists images, annotations and categories")
    return truth


def _by_id(prefix, key, entries, checked):
    """Return {id: entry} of a list, in ascending order; raise UserError for an invalid entry or a repeated id."""
    found = {}
    for entry in entries:
        entry = checked(f"{prefix}: an entry of {key}", entry if isinstance(entry, dict) else {})
        if entry["id"] in found:
            raise UserError(f"{prefix}: id {entry['id']} of {key} occurs twice: ids must be unique")
        found[entry["id"]] = entry
    return {n: found[n] for n in sorted(found, key=_rank)}


def _image(prefix, entry):
    number = _id(prefix, entry, "id")
    prefix = f"{prefix} (id {number})"
    name = entry.get("file_name")
    if not isinstance(name, str) or not name.strip():
        raise UserError(
            f"{prefix} has no file_name" if name is None else f"{prefix} has file_name={name!r}: it takes text"
        )
    prefix = f"{prefix}, {printable(name)},"
    return {
        "id": number,
        "file_name": name,
        "width": _side(prefix, entry, "width"),
        "height": _side(prefix, entry, "height"),
    }


def _side(prefix, entry, field):
    value = _number(prefix, entry, field)
    if value < 1 or value != int(value):
        raise UserError(f"{prefix} has {field}={entry[field]!r}: it takes a whole number of pixels, at least 1")
    return int(value)


def _category(prefix, entry):
    number = _id(prefix, entry, "id")
    name = entry.get("name")
    if isinstance(name, bool) or not isinstance(name, (str, int, float)) or not str(name).strip():
        raise UserError(
            f"{prefix} (id {number}) has no name"
            if name is None
            else f"{prefix} (id {number}) has name={name!r}: it takes text"
        )
    return {"id": number, "name": str(name)}


def _annotations(prefix, entries, images, categories):
    """Return (the annotations, with boxes cut to their images; {repair: number of times})."""
    cut, none, outside, kept, seen = 0, 0, 0, [], set()
    for position, entry in enumerate(entries, 1):
        entry = entry if isinstance(entry, dict) else {}
        number = _id(prefix, entry, "id") if entry.get("id") is not None else None
        if number is not None and number in seen:
            raise UserError(f"{prefix}: id {number} of annotations occurs twice: ids must be unique")
        seen.add(number)
        what = f"{prefix}: box {number if number is not None else f'number {position}'}"
        image, category = _id(what, entry, "image_id"), _id(what, entry, "category_id")
        if image not in images:
            raise UserError(f"{what} has image_id={image}, which is not among the images")
        image = images[image]
        what = f"{what} of {printable(image['file_name'])}"
        if category not in categories:
            raise UserError(f"{what} has category_id={category}, which is not among the categories")
        x, y, width, height = _bbox(what, entry)
        crowd = _crowd(what, entry)
        if width <= 0 or height <= 0:
            none += 1
            continue
        left, top = min(max(x, 0), image["width"]), min(max(y, 0), image["height"])
        right, bottom = min(max(x + width, 0), image["width"]), min(max(y + height, 0), image["height"])
        if right <= left or bottom <= top:
            outside += 1
            continue
        beyond = max(left - x, top - y, x + width - right, y + height - bottom)
        cut += beyond >= _ROUNDING
        box = [left, top, right - left, bottom - top] if beyond > 0 else [x, y, width, height]
        kept.append({
            "id": len(kept) + 1, "image_id": image["id"], "category_id": category, "bbox": box,
            "area": _area(entry, box), "iscrowd": crowd,
        })  # fmt: skip
    return kept, {
        "boxes cut at the border of their image": cut,
        "boxes without a width or height dropped": none,
        "boxes outside their image dropped": outside,
    }


def _bbox(what, entry):
    box = entry.get("bbox")
    values = [_float(value) for value in box] if isinstance(box, list) else []
    if len(values) != 4 or None in values:
        raise UserError(f"{what} has bbox={box!r}: it takes four numbers: left, top, width, height")
    return values


def _crowd(what, entry):
    value = entry.get("iscrowd")
    number = 0.0 if value is None else float(value) if isinstance(value, bool) else _float(value)
    if number not in (0, 1):
        raise UserError(f"{what} has iscrowd={value!r}: it takes 0 or 1")
    return int(number)


def _area(entry, box):
    """Return the annotation's own area, which is that of its outline if it has one; the box's area if it is missing."""
    value = _float(entry.get("area"))
    return value if value is not None and value > 0 else box[2] * box[3]


def _id(prefix, entry, field):
    """Return an id as an int, or as text if it is not a whole number."""
    value = entry.get(field)
    if value is None:
        raise UserError(f"{prefix} has no {field}")
    number = _float(value)
    if number is not None and number == int(number) and abs(number) < 2**53:
        return int(number)
    if isinstance(value, int) and not isinstance(value, bool):
        return value  # too large to be exact as a float
    if isinstance(value, str) and value.strip():
        return int(value) if value.strip().isdecimal() else value
    raise UserError(f"{prefix} has {field}={value!r}: it takes a whole number or text")


def _rank(number):
    """Return a sort key for ids: numbers first, then text."""
    return (1, 0, number) if isinstance(number, str) else (0, number, "")


def _number(prefix, entry, field):
    if entry.get(field) is None:
        raise UserError(f"{prefix} has no {field}")
    value = _float(entry[field])
    if value is None:
        raise UserError(f"{prefix} has {field}={entry[field]!r}: it takes a number")
    return value


def _float(value):
    """Return a number, or text that is one, as a finite float; else None. Bools are not numbers."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
