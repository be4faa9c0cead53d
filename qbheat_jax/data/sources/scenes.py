"""The `scenes` source: handwritten digits on crops of photographs, with exact boxes and masks. It works offline.

The digits are scikit-learn's (8 x 8 pixels, 16 grey levels, UCI's test set of 1,797), the photographs those of `photos`. A
scene shows zero to six digits at random scales and shades, with little overlap. Train, val and test use disjoint digits and
disjoint regions of the photographs.
"""

import functools
import gzip
import importlib.util
import os
import threading

import numpy as np
from PIL import Image

from qbheat_jax.data import annotations as annotations_lib
from qbheat_jax.data import augment
from qbheat_jax.data.sources import base, photos
from qbheat_jax.errors import UserError

SIZE = 128
# The most digits a scene shows, and the range of their sides in pixels.
MOST, SIDES = 6, (16, 64)
# A digit is left out if a larger fraction of its box, or of another digit's box, would overlap.
_OVERLAP = 0.1
# Ink below this fraction of full ink counts as invisible, and is not in the box.
_SEEN = 0.25
_SPLITS = {"train": 1.0, "val": 1 / 8, "test": 1 / 8}
_PLACES = {"train": (0.0, 0.7), "val": (0.7, 0.85), "test": (0.85, 1.0)}
_SEED = 2211_13228


class Scenes(base.ArraySource):
    """`scenes` or `scenes:N`: N (default 2048) training scenes, and N / 8 each for val and test."""

    boxed = True
    plain = True

    def __init__(self, spec="scenes"):
        _, colon, count = spec.partition(":")
        if colon and not (count.isdecimal() and int(count) >= 8):
            raise UserError(f"data.source='{spec}' is not accepted: it takes 'scenes' or 'scenes:N' with N >= 8 scenes")
        n = int(count) if colon else 2048
        super().__init__(spec, {s: int(n * fraction) for s, fraction in _SPLITS.items()}, [str(d) for d in range(10)])
        self.mask_names = ["background", *self.class_names]
        self._made, self._lock = {}, threading.Lock()

    def images(self, split):
        """Return uint8 [n, 128, 128, 3], made on first use."""
        return self._all(split)[0]

    def boxes(self, split, index):
        return self._all(split)[1][index]

    def masks(self, split, index):
        return self._all(split)[2][index]

    def annotations(self, split):
        return annotations_lib.coco_format(self._all(split)[1], self.class_names, "{}.png".format)

    def _all(self, split):
        split = self.split(split)
        with self._lock:
            if split not in self._made:
                made = [scene(split, n) for n in range(self.splits[split])]
                images, boxes, masks = zip(*made)
                self._made[split] = np.stack(images), boxes, masks
            return self._made[split]


@functools.cache
def digits():
    """Return (float32 [n, 8, 8] in 0..1, int32 labels [n]), from the installed wheel of scikit-learn.

    Raises:
      UserError: the package or the file is missing.
    """
    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "data.source='scenes' reads digits of scikit-learn, which is not installed: pip install scikit-learn"
        )
    path = os.path.join(list(spec.submodule_search_locations)[0], "datasets", "data", "digits.csv.gz")
    try:
        with gzip.open(path, "rt") as handle:
            table = np.loadtxt(handle, delimiter=",", dtype=np.float32)
    except OSError as error:
        raise UserError(
            f"data.source='scenes' cannot read {path} ({error}), a file of scikit-learn: pip install --force-reinstall "
            "scikit-learn"
        ) from error
    return table[:, :-1].reshape(-1, 8, 8) / 16, table[:, -1].astype(np.int32)


@functools.cache
def _photograph(name):
    return photos.load(name)


def scene(split, index):
    """Return scene `index` of a split: (uint8 [128, 128, 3], its `Boxes`, its mask uint8 [128, 128], see `masks`).

    It does not depend on the number of scenes.
    """
    generator = augment.rng(_SEED, list(_SPLITS).index(split), index, "scenes")
    canvas, placed, mask = _background(split, generator).astype(np.float32), [], np.zeros((SIZE, SIZE), np.uint8)
    images, labels = digits()
    begin, end = (int(fraction * len(labels)) for fraction in _PLACES[split])
    for _ in range(int(generator.integers(0, MOST + 1))):
        which = int(generator.integers(begin, end))
        low, high = np.log(SIDES)
        side = round(float(np.exp(generator.uniform(low, high))))
        top, left = generator.integers(0, SIZE - side + 1, 2).tolist()
        ink = np.asarray(Image.fromarray(images[which]).resize((side, side), Image.Resampling.BICUBIC)).clip(0, 1)
        rows, columns = (np.flatnonzero((ink > _SEEN).any(axis)) for axis in (1, 0))
        box = (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)
        if any(_covered(box, other) > _OVERLAP for other, _ in placed):
            continue
        part = canvas[top : top + side, left : left + side]
        part += ink[..., None] * (_shade(part.mean(), generator) - part)
        mask[top : top + side, left : left + side][ink > _SEEN] = 1 + labels[which]
        placed.append((box, labels[which]))
    corners, classes = np.array([b for b, _ in placed], np.float32), np.array([c for _, c in placed], np.int32)
    boxes = annotations_lib.Boxes(corners.reshape(-1, 4), classes, np.zeros(len(placed), bool), (SIZE, SIZE))
    return canvas.round().astype(np.uint8), boxes, mask


def _background(split, generator):
    """Return uint8 [128, 128, 3]: a resized crop, of up to 256 pixels a side, from the split's band of a photograph."""
    image = _photograph(photos.PHOTOGRAPHS[int(generator.integers(len(photos.PHOTOGRAPHS)))][0])
    top, left, height, width = photos.band(*image.shape[:2], split)
    side = min(int(generator.integers(SIZE, 2 * SIZE + 1)), height, width)
    y, x = (int(generator.integers(0, n - side + 1)) for n in (height, width))
    return augment.crop_resize(image, (top + y, left + x, side, side), SIZE)


def _shade(around, generator):
    """Return a colour, float32 [3], whose brightness differs from the background's by at least 80 levels."""
    choices = [span for span in ((0.0, around - 80), (around + 80, 255.0)) if span[1] > span[0]]
    low, high = choices[int(generator.integers(len(choices)))]
    return np.clip(generator.uniform(low, high) + generator.uniform(-20, 20, 3), 0, 255).astype(np.float32)


def _covered(a, b):
    """Return the overlap of two boxes as a fraction of the smaller one's area."""
    a, b = np.array(a, np.float32), np.array(b, np.float32)
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])
    return np.maximum(high - low, 0).prod() / min((a[2:] - a[:2]).prod(), (b[2:] - b[:2]).prod())
