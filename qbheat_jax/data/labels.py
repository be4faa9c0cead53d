"""What a classifier's outputs are called: classes.tsv of a workdir, ImageNet's 1,000 names, and a data set's folders."""

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
    """The 1,000 classes of ILSVRC-2012 in their usual order (of their WordNet ids): [(id, English name), ...]."""
    text = importlib.resources.files(__package__).joinpath("imagenet.tsv").read_text(encoding="utf-8")
    return _parse(text, "imagenet.tsv")


def write(workdir, classes):
    """Writes WORKDIR/classes.tsv for a head of 1,000 classes, which is taken for ImageNet's -> whether it was written."""
    if classes != IMAGENET:
        return False
    save(workdir, imagenet())
    return True


def save(workdir, classes):
    """classes [(key, name), ...], in the order of the outputs -> WORKDIR/classes.tsv, a line `key<TAB>name` each."""
    path = epath.Path(workdir) / FILE
    text = "".join(f"{' '.join(key.split())}\t{' '.join(name.split())}\n" for key, name in classes)
    with writing(path):
        atomic.write(path, text)


def read(workdir):
    """[(key, name), ...] of WORKDIR/classes.tsv in the order of the outputs, or None where there is no such file."""
    path = epath.Path(workdir) / FILE
    try:
        if not path.exists():
            return None
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return _parse(text, path)


def match(class_names, keys, names):
    """Which outputs of a model the classes of a data set are -> int32[len(class_names)].

    class_names: the data set's, usually folder names; keys, names: the model's, in the order of its outputs. A class is
    found by key or by name, whatever the case and whether words are parted by spaces, `_` or `-`. Where none is found,
    whole numbers are taken as numbers of outputs, and other names in sorted order if there are as many as outputs; both
    with a notice. Raises UserError that names the first class without an output.
    """
    place = {_plain(name): k for k, name in enumerate(names)} | {_plain(key): k for k, key in enumerate(keys)}
    found = [place.get(_plain(name)) for name in class_names]
    missing = [name for name, k in zip(class_names, found) if k is None]
    if missing and len(missing) == len(found):
        if all(re.fullmatch(r"[0-9]{1,9}", name) for name in class_names):
            log.info("the classes are numbers: they are taken as those of the model's outputs, from 0")
            found = [int(name) if int(name) < len(keys) else None for name in class_names]
            missing = [name for name, k in zip(class_names, found) if k is None]
        elif len(found) == len(keys):
            log.info(
                "none of the data's %d class names is one of the model's, which has as many outputs: they are taken in "
                "sorted order",
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
            raise UserError(f"{path} line {number} is not a class: it takes KEY<TAB>NAME")
    if not classes:
        raise UserError(f"{path} is empty: it takes a line KEY<TAB>NAME for each class")
    return classes
