"""The `photos` source: 64 x 64 crops of twenty photographs from the wheels of scikit-image and scikit-learn.

It is a real, labelled data set that needs no network. The label is the photograph. Train, val and test crops come from
three disjoint bands of each photograph, so the test measures generalisation.
"""

import importlib.util
import os
import threading

import numpy as np

from qbheat_jax.data import augment, decode
from qbheat_jax.data.sources import base
from qbheat_jax.errors import UserError

SIZE = 64

# (name, package, module, folder, file), in the order of the labels.
_SKIMAGE = ("scikit-image", "skimage", "data")
_SKLEARN = ("scikit-learn", "sklearn", os.path.join("datasets", "images"))
PHOTOGRAPHS = tuple(
    (name, *(_SKLEARN if name in ("china", "flower") else _SKIMAGE), f"{name}.{extension}")
    for name, extension in (
        ("astronaut", "png"), ("brick", "png"), ("camera", "png"), ("cell", "png"), ("chelsea", "png"),
        ("clock_motion", "png"), ("coffee", "png"), ("coins", "png"), ("grass", "png"), ("gravel", "png"),
        ("hubble_deep_field", "jpg"), ("ihc", "png"), ("moon", "png"), ("motorcycle_left", "png"), ("page", "png"),
        ("retina", "jpg"), ("rocket", "jpg"), ("text", "png"), ("china", "jpg"), ("flower", "jpg"),
    )
)  # fmt: skip

# Split -> (crops per photograph, start and end in per cent of its longer side).
BANDS = {"train": (125, 0, 55), "val": (25, 55, 75), "test": (50, 75, 100)}

# Part of the data set: another seed gives another data set.
_SEED = 2211_13228


def load(name):
    """Return a photograph as uint8 [H, W, 3], from its installed wheel.

    Raises:
      UserError: the package or the file is missing.
    """
    _, wheel, package, folder, file = next(row for row in PHOTOGRAPHS if row[0] == name)
    # find_spec of a top-level package runs none of its code, whereas importing it takes a second or more.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"data.source='photos' reads images of the package {wheel}, which is not installed: pip install {wheel}"
        )
    path = os.path.join(list(spec.submodule_search_locations)[0], folder, file)
    try:
        with open(path, "rb") as handle:
            return decode.decode(handle.read())
    except (OSError, decode.BadImage) as error:
        raise UserError(
            f"data.source='photos' cannot read {path} ({error}), a file of the package {wheel}: pip install "
            f"--force-reinstall {wheel}"
        ) from error


def band(height, width, split):
    """Return (top, left, height, width) of a split's band, which cuts the longer side."""
    _, begin, end = BANDS[split]
    if width >= height:
        left, right = width * begin // 100, width * end // 100
        return 0, left, height, right - left
    top, bottom = height * begin // 100, height * end // 100
    return top, 0, bottom - top, width


def corners(label, height, width, split):
    """Return (top int64 [k], left int64 [k]) of a split's crops in a photograph of height x width pixels."""
    count = BANDS[split][0]
    top, left, band_height, band_width = band(height, width, split)
    # Each split has its own stream of draws, so it does not depend on the number of crops of the others.
    draws = augment.bits(_SEED, label, np.arange(2 * count) + 10_000 * list(BANDS).index(split), "photos")
    y = draws[:count] % (band_height - SIZE + 1)
    x = draws[count:] % (band_width - SIZE + 1)
    return top + y.astype(np.int64), left + x.astype(np.int64)


class Photos(base.ArraySource):
    """Crops of the photographs; example i of a split shows photograph i % 20, so every prefix is balanced."""

    def __init__(self, spec="photos"):
        names = [row[0] for row in PHOTOGRAPHS]
        super().__init__(spec, {split: count * len(names) for split, (count, _, _) in BANDS.items()}, names)
        self._labels = {split: base.as_labels(np.arange(n) % len(names)) for split, n in self.splits.items()}
        self._images = {}
        self._lock = threading.Lock()

    def labels(self, split):
        return self._labels[self.split(split)]

    def images(self, split):
        """Return uint8 [n, 64, 64, 3], read-only; all splits are cut on first use."""
        split = self.split(split)
        with self._lock:
            if not self._images:
                self._images = _cut(self.class_names)
            return self._images[split]


def _cut(names):
    crops = {split: np.empty((count, len(names), SIZE, SIZE, 3), np.uint8) for split, (count, _, _) in BANDS.items()}
    for label, name in enumerate(names):
        photograph = load(name)
        for split, array in crops.items():
            for k, (top, left) in enumerate(zip(*corners(label, *photograph.shape[:2], split))):
                array[k, label] = photograph[top : top + SIZE, left : left + SIZE]
    images = {split: array.reshape(-1, SIZE, SIZE, 3) for split, array in crops.items()}
    for array in images.values():
        array.flags.writeable = False
    return images
