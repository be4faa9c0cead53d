"""The package's own train step as something to time, on one device, with a batch that is there already."""

import jax
import numpy as np

from qbheat_jax import device_mesh, methods, rng
from qbheat_jax.ops import images, quarters
from qbheat_jax.train import optim
from qbheat_jax.train import state as state_lib


class Step:
    """The train step of a checked config and its objective, state made from the config's seed.

    `call()` sends one step to the device and returns its loss there, which is ready when the step is done. `batch`: dict
    of numpy arrays.
    """

    def __init__(self, config, objective):
        mesh = device_mesh.make_mesh({"data": 1}, jax.devices()[:1])
        key = rng.root(config.seed)
        optimizer = optim.adamw(config, optim.schedule(config, config.total_steps, config.batch_size))
        shapes = methods.batch_spec(config).shapes(config.batch_size)
        self.config, self.batch = config, noise(config)
        self._state, shardings = state_lib.create(objective, optimizer, shapes, key, mesh)
        self._step = state_lib.train_step(objective, optimizer, key, shardings, mesh)
        self._placed = device_mesh.put_batch(self.batch, mesh, config.batch_size)

    def variables(self):
        """A copy of {"params", "batch_stats"} as numpy arrays: the step donates its own."""
        return jax.tree.map(np.array, self._state.variables())

    def call(self):
        self._state, metrics = self._step(self._state, self._placed)
        return metrics["loss"]


def noise(config):
    """A batch of noise, as the batch contract has it."""
    generator, n, size = np.random.default_rng(0), config.batch_size, config.image_size
    placements = quarters.PLACEMENT_SETS[config.quarter.placements]
    return {
        "image": generator.integers(0, 256, (n, size, size, 3), np.uint8),
        "quarter": np.resize(placements, n).astype(np.int32),
        "label": generator.integers(0, max(1, config.head.classes), n).astype(np.int32),
        "mask": np.ones(n, bool),
    }


def normalised(config, batch):
    """float32 [B, S, S, 3]: the batch's images as the encoder takes them."""
    return np.array(images.PIXELS[config.pixels].normalise(batch["image"]))
