"""The `synthetic` source: noise images for benchmarks, cheap enough never to be the bottleneck."""

import threading

import numpy as np

from qbheat_jax.data import augment
from qbheat_jax.data.sources import base
from qbheat_jax.errors import UserError

CLASSES = 10
# The bank of distinct images has at most this many bytes and images; example i shows image i modulo its length.
_BANK_BYTES, _BANK_IMAGES = 32 << 20, 256


class Synthetic(base.ArraySource):
    """`synthetic` or `synthetic:N`: N (default 8192) train images and N / 8 each for val and test; label = index % 10.

    The images have the model's size and are not augmented.
    """

    def __init__(self, spec, image_size):
        _, colon, count = spec.partition(":")
        if colon and not (count.isdecimal() and int(count) >= 8):
            raise UserError(
                f"data.source='{spec}' is not accepted: it takes 'synthetic' or 'synthetic:N' with N >= 8 images"
            )
        n = int(count) if colon else 8192
        splits = {"train": n, "val": n // 8, "test": n // 8}
        super().__init__(spec, splits, [f"class{k}" for k in range(CLASSES)])
        self.image_size = image_size
        self._banks = {}
        self._lock = threading.Lock()

    def labels(self, split):
        return (np.arange(self.splits[self.split(split)]) % CLASSES).astype(np.int32)

    def gather(self, indices, image_size):
        """Return (uint8 [c, image_size, image_size, 3], int32 labels [c]) of example indices int64 [c]."""
        bank = self._bank(image_size)
        return bank[indices % len(bank)], (indices % CLASSES).astype(np.int32)

    def images(self, split):
        """Return uint8 [n, S, S, 3], S being the size given to the constructor. The bank is copied out to all n images."""
        return self.gather(np.arange(self.splits[self.split(split)]), self.image_size)[0]

    def fetch(self, split, index):
        split = self.split(split)
        images, labels = self.gather(np.array([index]), self.image_size)
        return images[0], int(labels[0]), f"{self.spec} {split}[{index}]"

    def _bank(self, size):
        with self._lock:
            if size not in self._banks:
                count = max(1, min(_BANK_IMAGES, _BANK_BYTES // (3 * size * size)))
                self._banks[size] = augment.rng(0, 0, size, "noise").integers(0, 256, (count, size, size, 3), np.uint8)
            return self._banks[size]
