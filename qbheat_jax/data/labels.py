"""Names of a classifier's outputs: classes.tsv of a workdir, ImageNet's 1,000 classes, and a data set's folders."""

import importlib.resources
import logging
import re

import numpy as np
from etils import epath

from qbheat_jax import atomic
from qbheat_jax.errors import UserError, writing

log = logging.getLogger("qbheat")

FILE = "classes.tsv"
IMAGENET = 1000


def imagenet():
    """Return ImageNet's 1,000 classes (ILSVRC-2012) in the usual order, by WordNet id: [(id, English name), ...]."""
    text = importlib.resources.files(__package__).joinpath("imagenet.tsv").read_text(encoding="utf-8")
    return _parse(text, "imagenet.tsv")


def write(workdir, classes):
    """Write WORKDIR/classes.tsv if there are 1,000 `classes` (int), taken for ImageNet's; return whether it was written."""
    if classes != IMAGENET:
        return False
    save(workdir, imagenet())
    return True


def save(workdir, classes):
    """Write WORKDIR/classes.tsv, one line `key<TAB>name` per output.

    Args:
      workdir: path of the workdir.
      classes: [(key, name), ...], in the order of the outputs.

    Raises:
      UserError: the file cannot be written.
    """
    path = epath.Path(workdir) / FILE
    text = "".join(f"{' '.join(key.split())}\t{' '.join(name.split())}\n" for key, name in classes)
    with writing(path):
        atomic.write(path, text)


def read(workdir):
    """Return [(key, name), ...] of WORKDIR/classes.tsv in the order of the outputs; None if the file is missing.

    Raises:
      UserError: the file cannot be read, or a line is not KEY<TAB>NAME.
    """
    path = epath.Path(workdir) / FILE
    try:
        if not path.exists():
            return None
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return _parse(text, path)


def match(class_names, keys, names):
    """Map the classes of a data set to the outputs of a model.

    A class is found by key or name, ignoring case and whether words are separated by spaces, `_` or `-`. If no class is
    found, there are two fallbacks, both logged. Whole numbers are taken as indices of outputs. Other names are taken
    in sorted order, if there are as many as outputs.

    Args:
      class_names: list of str, the data set's classes, usually folder names.
      keys, names: lists of str, the model's classes, in the order of its outputs.

    Returns:
      int32 [len(class_names)].

    Raises:
      UserError: a class has no output; the message names the first such class.
    """
    place = {_plain(name): k for k, name in enumerate(names)} | {_plain(key): k for k, key in enumerate(keys)}
    found = [place.get(_plain(name)) for name in class_names]
    missing = [name for name, k in zip(class_names, found) if k is None]
    if missing and len(missing) == len(found):
        if all(re.fullmatch(r"[0-9]{1,9}", name) for name in class_names):
            log.info("the class names are numbers: they are taken as indices of the model's outputs, from 0")
            found = [int(name) if int(name) < len(keys) else None for name in class_names]
            missing = [name for name, k in zip(class_names, found) if k is None]
        elif len(found) == len(keys):
            log.info(
                "none of the data's %d class names is known to the model, which has as many outputs: they are taken in sorted "
                "order",
                len(found),
            )
            found, missing = np.argsort(np.argsort(class_names)), []
    if missing:
        example = f"{keys[0]!r} or {names[0]!r}" if keys[0] != names[0] else repr(keys[0])
        raise UserError(
            f"class {missing[0]!r} of the data is none of the model's {len(keys)} classes ({len(missing)} of "
            f"{len(found)} are not): name the class folders as in its {FILE}, such as {example}"
        )
    return np.asarray(found, np.int32)


def _plain(name):
    return re.sub(r"[\W_]+", " ", name).strip().casefold()


def _parse(text, path):
    classes = [tuple(line.split("\t")) for line in text.splitlines()]
    for number, fields in enumerate(classes, 1):
        if len(fields) != 2 or not all(fields):
            raise UserError(f"{path} line {number} is {fields!r}: it takes KEY<TAB>NAME, neither of them empty")
    if not classes:
        raise UserError(f"{path} is empty: it takes one line KEY<TAB>NAME per class")
    return classes
