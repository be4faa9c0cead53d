"""What the tests of probes look at: plain classes, an encoder that needs no compiling to speak of, and a config."""

import jax.numpy as jnp
import numpy as np

from qbheat_jax import config as config_lib
from qbheat_jax import data
from qbheat_jax.data.sources.base import ArraySource
from qbheat_jax.probe import encoders
from qbheat_jax.probe.fields import PROBE


class Blobs(ArraySource):
    """Four classes of plainly coloured noise, so that a histogram tells them apart and nothing is left to chance."""

    def __init__(self, splits=(("train", 80), ("val", 24), ("test", 41)), labelled=True):
        super().__init__("blobs", dict(splits), list("abcd") if labelled else None)
        generator = np.random.default_rng(0)
        self._images, self._labels = {}, {}
        for split, n in splits:
            labels = np.arange(n) % 4
            base = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200], [200, 200, 30]])[labels]
            noise = generator.integers(-29, 30, (n, 32, 32, 3))
            self._images[split] = (base[:, None, None] + noise).astype(np.uint8)
            self._labels[split] = labels.astype(np.int32)

    def images(self, split):
        return self._images[self.split(split)]

    def labels(self, split):
        return self._labels[self.split(split)]


def config(**fields):
    given = {
        "data.source": "blobs",
        "image_size": 32,
        "encoder.name": "pebble",
        "batch_size": 16,
        "total_epochs": 10,
        "learning_rates": (0.03, 1.0),
        "head.width": 16,
        "head.heads": 2,
        "monitors.images": 0,
    }
    given.update({name.replace("__", "."): value for name, value in fields.items()})
    return config_lib.resolve(given, PROBE)


def tiny(seed=0, width=16):
    """A frozen encoder of one random linear map of patches: images of 32 pixels -> 4 x 4 cells of `width`."""
    kernel = np.random.default_rng(seed).normal(size=(8 * 8 * 3, width)).astype(np.float32) / 8

    def features(variables, images):
        n, size = len(images), images.shape[1] // 8
        x = images.astype(jnp.float32).reshape(n, size, 8, size, 8, 3) / 255
        return jnp.tanh(x.transpose(0, 1, 3, 2, 4, 5).reshape(n, size, size, -1) @ variables["kernel"])

    about = {"encoder": "tiny", "step": None}
    return encoders.FrozenEncoder(features, {"kernel": kernel}, data.ImageSpec(32), "blobs", about)
