"""Encode augmented training images batch by batch, anew in every epoch."""

import numpy as np

from qbheat_jax import data
from qbheat_jax.probe.pmap import pmap_batches


class Augmented:
    """Features of augmented images, without a cache. `fit.fit` takes them in place of `features.Features`.

    Args:
      frozen: FrozenEncoder.
      mapped: pmapped function to features, see `encode.Encoding.mapped`.
      source, split: the images.
      config: of the probe.
      shape: of one image's features.
      mean, scale: as in `Features`.
    """

    def __init__(self, frozen, mapped, source, split, config, shape, mean=None, scale=None):
        self.shape, self._mean, self._scale = shape, mean, scale
        self._frozen, self._mapped, self._source, self._split, self._config = frozen, mapped, source, split, config
        self._batches = None

    def __len__(self):
        return self._source.splits[self._split]

    def epoch(self, seed, number, size, steps):
        """Yield one epoch as `Features.epoch` does, one step at a time. Rows of unreadable images get weight 0."""
        if number == 0:
            self._batches = self._open(seed, size)
        for _ in range(steps):
            x, labels = next(self._batches)
            if self._mean is not None:
                x = ((x - self._mean) * self._scale).astype(np.float32)
            missing = size - len(x)
            weights = (np.arange(size) < len(x)).astype(np.float32)
            x = np.concatenate([x, np.zeros((missing, *self.shape), np.float32)])
            yield x, np.concatenate([labels, np.zeros(missing, np.int32)]), weights, np.arange(size)[None]

    def _open(self, seed, size):
        """Yield (features float32 [n, ...], labels int32 [n]) of readable images without end, n <= size."""
        config, taken = self._config, []
        spec = self._frozen.spec.augmented(config.data, seed)
        batches = data.train_batches(
            self._source, spec, split=self._split, batch_size=size,
            workers=config.data.workers, prefetch=config.data.prefetch,
            bad=data.BadFiles(config.data.max_bad_fraction, len(self)),
        )  # fmt: skip

        def inputs():
            for batch in batches:
                labels = batch["label"][batch["mask"]]
                self._source.check_labelled(self._split, labels)
                taken.append(labels)
                yield batch["image"], batch["mask"]

        for x in pmap_batches(self._mapped, self._frozen.variables, inputs()):
            yield x, taken.pop(0)
