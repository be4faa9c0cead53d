"""Checkpoints in several parts, read through the index file that lists them. A part alone is refused."""

import json
import pathlib
import re

from qbheat_jax.errors import UserError

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{2,})-of-(?P<count>\d{2,})(?P<ending>\..+)?")


def is_index(path, head):
    """Return whether a file that begins with `head` is an index: JSON with a weight_map, {array: file}."""
    return head.lstrip()[:1] == b"{" and b"\0" not in head[:8] and isinstance(_loaded(path).get("weight_map"), dict)


def parts(path):
    """Return the files that an index file lists, in order; [] for any other file."""
    path = pathlib.Path(path)
    with path.open("rb") as file:
        head = file.read(16)
    return [path.with_name(name) for name in _names(path, _weight_map(path))] if is_index(path, head) else []


def read(path, reader):
    """Return (tree, format) of an index file, from `reader` of each part. Raise UserError where a part is missing."""
    places = _weight_map(path)
    tree, formats = {}, set()
    files = _names(path, places)
    missing = [name for name in files if not path.with_name(name).exists()]
    if missing:
        raise UserError(
            f"{path} lists {len(files)} parts, and {', '.join(missing[:3])} is not beside it"
            f"{f' ({len(missing)} are not)' if missing[1:] else ''}: fetch all of them into {path.parent}"
        )
    for name in files:
        part, kind = reader(path.with_name(name))
        formats.add(kind)
        lacking = [array for array, place in places.items() if place == name and array not in part]
        if lacking:
            raise UserError(
                f"{path} says that {lacking[0]} is in {name}, which does not hold it: fetch that file again"
            )
        tree |= {array: part[array] for array, place in places.items() if place == name}
    return tree, f"{' and '.join(sorted(formats))}, {len(files)} parts by index"


def check_whole(path):
    """Raise UserError for a file whose name is that of one part of several."""
    match = _PART.fullmatch(path.name)
    if not match or int(match["count"]) < 2:
        return
    ending = match["ending"] or ""
    index = path.with_name(f"{match['stem']}{ending}.index.json")
    part = f"{path} is part {int(match['number'])} of {int(match['count'])} of a checkpoint"
    if index.exists():
        raise UserError(f"{part}: name the index of all of them, {index}")
    raise UserError(f"{part}: fetch {index.name} and all parts into {path.parent}, and name {index.name}")


def _loaded(path):
    try:
        loaded = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _weight_map(path):
    return _loaded(path)["weight_map"]


def _names(path, places):
    """Return the names of an index file's parts. Raise UserError unless they are names of files beside it."""
    names = sorted({str(name) for name in places.values()})
    strange = [name for name in names if pathlib.PurePath(name).name != name]
    if strange or not names:
        raise UserError(f"{path} lists {strange[0] if strange else 'no parts'}: it takes names of files beside it")
    return names
