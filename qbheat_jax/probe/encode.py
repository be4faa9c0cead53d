"""Encode the splits of a source with a frozen encoder, each split once."""

import time

import flax.linen as nn
import jax
import numpy as np

from qbheat_jax import data, device_mesh
from qbheat_jax.data import device_cache
from qbheat_jax.errors import UserError
from qbheat_jax.probe import cache
from qbheat_jax.probe.fields import SEGMENTS
from qbheat_jax.probe.pmap import pmap, pmap_batches

# Protocols that use the mean over the cells; the others use the cells.
POOLED = ("lin", "knn")
# Protocols that also take features without an encoder.
TRIVIAL = (*POOLED, *SEGMENTS)


class Encoding:
    """Function from a split to the features that a probe's head takes: the encoder's cells, pooled by the config.

    Args:
      frozen: FrozenEncoder.
      config: of the probe.
      store: FeatureCache.
      images: total number of images; it decides whether features stay in memory.

    Attributes:
      shape: of one image's features.
      batch_size: images at once.
      mapped: pmapped (variables, images uint8 [B, H, W, 3] or clips) -> features float32 [B, *shape].
      rates: {split: images/s} of the splits encoded.
    """

    def __init__(self, frozen, config, store, images):
        self._frozen, self._config, self._store = frozen, config, store
        self._labelled = frozen.spec.answer == "label"
        self._pool = 0 if config.protocol in POOLED else config.head.pool
        example = frozen.spec.shapes(1)["image"]
        grid = jax.eval_shape(frozen.features, frozen.variables, example).shape[1:3]
        if self._pool and (grid[0] % self._pool or grid[1] % self._pool):
            raise UserError(
                f"config field head.pool={self._pool} is not accepted: it takes a divisor of the map's "
                f"{grid[0]} x {grid[1]} cells"
            )
        self.batch_size = config.batch_size
        self.shape = jax.eval_shape(self._cells, frozen.variables, example).shape[1:]
        self.mapped, self.rates = pmap(self._cells), {}
        self._in_memory = images * np.prod(self.shape) * 4 <= config.cache_gib * 2**30

    def _cells(self, variables, images):
        maps = self._frozen.features(variables, images)
        if not self._pool:
            return maps.mean((1, 2))
        return nn.avg_pool(maps, (self._pool, self._pool), (self._pool, self._pool))

    def __call__(self, source, split):
        """Return (Features, index int64 [N]) of the readable images of a split, in its order. Labels are the spec's `answer`.

        Raises:
          UserError: an image has no label.
        """
        frozen, start = self._frozen, time.perf_counter()
        about = {
            **{key: value for key, value in frozen.description.items()},
            "weights": cache.weights_digest(frozen.variables),
            "dtype": self._config.dtype,
            "data": source.identity(split),
            "split": split,
            "image_size": frozen.image_size,
            "pool": self._pool,
            **({} if self._labelled else {"answer": frozen.spec.answer}),
        }
        # If another probe left the cells in memory, take their mean instead of encoding.
        cells = None if self._pool else self._store.lookup(about, ignore="pool")
        features, index, made = self._store.get(
            about, source.splits[split], self.shape,
            lambda: _means(*cells) if cells else self.batches(source, split),
            in_memory=self._in_memory, cache_gib=self._config.cache_gib,
        )  # fmt: skip
        if made and not cells:
            self.rates[split] = len(features) / (time.perf_counter() - start)
        if not len(features):
            raise UserError(f"data.source={source.spec!r} split {split!r} has no image that can be read")
        if self._labelled:
            source.check_labelled(split, features.labels)
        return features, index

    def batches(self, source, split):
        """Yield (features [n, ...], labels [n, ...], index int32 [n]) without unreadable images."""
        config, spec, taken = self._config, self._frozen.spec, []
        # On one device the batch may have any size.
        alone = device_mesh.make_mesh({"data": 1, "fsdp": 1}, jax.local_devices()[:1])
        batches = data.eval_batches(
            source, spec, split=split, batch_size=config.batch_size,
            workers=config.data.workers, prefetch=config.data.prefetch,
            bad=data.BadFiles(config.data.max_bad_fraction, source.splits[split]),
            cache=device_cache.of(config.data, spec.image_size, source, split, alone) if spec.cacheable else None,
        )  # fmt: skip

        def inputs():
            for batch in map(jax.device_get, batches):
                taken.append([batch[key][batch["mask"]] for key in (spec.answer, "index")])
                yield batch["image"], batch["mask"]

        for x in pmap_batches(self.mapped, self._frozen.variables, inputs()):
            yield x, *taken.pop(0)


def _means(features, index):
    """Yield (mean over the cells float32 [n, C], labels, index) in batches, from features of the cells."""
    for block, x in features.blocks():
        yield x.mean((1, 2)), features.labels[block], index[block]
