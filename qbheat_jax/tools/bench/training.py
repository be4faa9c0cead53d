"""The package's train step on one device with a fixed batch, for timing."""

import jax
import numpy as np

from qbheat_jax import device_mesh, methods, rng
from qbheat_jax.ops import images, quarters
from qbheat_jax.train import optim
from qbheat_jax.train import state as state_lib


class Step:
    """The train step of a config, with a state initialised from the config's seed.

    Args:
      config: A checked config.
      objective: The method.

    Attributes:
      config: The config.
      batch: Dict of numpy arrays.
    """

    def __init__(self, config, objective):
        mesh = device_mesh.make_mesh({"data": 1}, jax.devices()[:1])
        key = rng.root(config.seed)
        optimizer = optim.optimizer(config, optim.schedule(config, config.total_steps, config.batch_size))
        shapes = methods.batch_spec(config).shapes(config.batch_size)
        self.config, self.batch = config, noise(config)
        self._state, shardings = state_lib.create(objective, optimizer, shapes, key, mesh)
        self._step = state_lib.train_step(objective, optimizer, key, shardings, mesh)
        self._placed = device_mesh.put_batch(self.batch, mesh, config.batch_size)

    def variables(self):
        """Return {"params", "batch_stats"} as numpy copies, since the step donates its arrays."""
        return jax.tree.map(np.array, self._state.variables())

    def call(self):
        """Send one step to the device and return its loss, an array that is ready when the step is done."""
        self._state, metrics = self._step(self._state, self._placed)
        return metrics["loss"]


def noise(config):
    """Return a batch of noise for a config: {"image", "quarter", "label", "mask"} of numpy arrays."""
    generator, n, size = np.random.default_rng(0), config.batch_size, config.image_size
    placements = quarters.PLACEMENT_SETS[config.quarter.placements]
    return {
        "image": generator.integers(0, 256, (n, size, size, 3), np.uint8),
        "quarter": np.resize(placements, n).astype(np.int32),
        "label": generator.integers(0, max(1, config.head.classes), n).astype(np.int32),
        "mask": np.ones(n, bool),
    }


def normalised(config, batch):
    """Return the batch's images, normalised for the encoder: float32 [B, S, S, 3]."""
    return np.array(images.PIXELS[config.pixels].normalise(batch["image"]))
