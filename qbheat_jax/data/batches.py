"""Batch iterators: the plan that all of them share, and the iterators that need no tensorflow."""

import math

import numpy as np

from qbheat_jax.data import augment
from qbheat_jax.data.bad_files import BadFiles
from qbheat_jax.data.order import Order, Slices
from qbheat_jax.data.specs.image import build, empty
from qbheat_jax.errors import UserError

# Examples built by one call: enough to make Python's overhead small, few enough to keep all workers busy.
CHUNK = 16


class Plan:
    """The examples of this process, in order. Checks that the batch can be filled and shared.

    Attributes:
      source, split, spec: images and what a batch of them holds.
      bad: BadFiles that counts unreadable images.
      batch_size: examples of a global batch.
      local: examples of this process's share of a batch.
      start: global position of the first example.
      order: `Order` of the split.
      slices: `Slices` of this process.
      batches: number of batches; None if endless.
    """

    def __init__(
        self, source, split, spec, batch_size, process_index, process_count, bad, *, start=0, epochs=None, rows=None
    ):
        self.source, self.split, self.spec = source, source.split(split), spec
        n = source.splits[self.split]
        if batch_size < 1 or batch_size % process_count:
            raise UserError(
                f"batch_size={batch_size} cannot be shared by {process_count} processes: use a multiple of "
                f"{process_count}"
            )
        if n < 1:
            raise UserError(f"data.source='{source.spec}' split '{self.split}' has no images")
        if spec.train and n < batch_size:
            raise UserError(
                f"data.source='{source.spec}' split '{self.split}' has {n} images, fewer than batch_size={batch_size}: "
                f"use batch_size={n} or less, or more images"
            )
        self.batch_size, self.start = batch_size, start
        per_epoch = math.ceil(n / batch_size)
        self.batches = None if epochs is None else per_epoch * epochs
        padded = None if spec.train else per_epoch * batch_size
        self.order = Order(n, spec.seed, shuffle=spec.train, padded=padded)
        if rows is None:  # part number process_index of process_count equal parts
            share = batch_size // process_count
            rows = process_index * share + np.arange(share)
        self.slices = Slices(start, batch_size, np.asarray(rows, np.int64), CHUNK)
        self.local = self.slices.local
        self.bad = bad if bad is not None else BadFiles(1.0, n)

    def fetch(self, index):
        """Return (data, label, name) of example `index`, see `ImageSpec.fetch`."""
        return self.spec.fetch(self.source, self.split, index)


class Batches:
    """Base class of iterators over the local batches of one process.

    `position` is the global position after the last batch returned. An iterator created with this `position` continues
    there, with any number of processes.
    """

    def __init__(self, plan):
        self.plan = plan
        self.position = plan.start

    def __iter__(self):
        return self

    def __next__(self):
        batch = self._next()
        self.plan.bad.check()
        self.position += self.plan.batch_size
        return batch

    def _examples(self):
        """Return (epochs, indices) of the next batch, int64 [local] each, -1 for padding. Raise StopIteration at the end."""
        plan = self.plan
        done = (self.position - plan.start) // plan.batch_size
        if plan.batches is not None and done >= plan.batches:
            raise StopIteration
        first = done * plan.slices.per_batch
        return plan.order(np.concatenate([plan.slices.positions(first + k) for k in range(plan.slices.per_batch)]))

    def close(self):
        """Stop the iterator and its background threads."""


class PlainBatches(Batches):
    """Batches built on demand in the caller's thread, for sources that need little time."""

    def _next(self):
        epochs, indices = self._examples()
        return build(self.plan.spec, lambda _, index: self.plan.fetch(index), epochs, indices, self.plan.bad)


class NumpyBatches(Batches):
    """Batches of the `synthetic` source: noise by index, without augmentation, threads or tensorflow.

    A further view is the same noise, shifted cyclically by its own random draw and mirrored as `spec.flip` sets. Of a smaller
    view it is the top left corner.
    """

    def _next(self):
        plan, size = self.plan, self.plan.spec.image_size
        epochs, indices = self._examples()
        real = indices >= 0
        quarters = plan.spec.quarters(epochs, np.maximum(indices, 0))
        images, labels = plan.source.gather(np.maximum(indices, 0), size)
        if not real.all():
            padding = empty(len(indices), {"image": size})
            images = np.where(real[:, None, None, None], images, padding["image"])
            labels = np.where(real, labels, padding["label"])
        crops = {"image": images}
        for view, name in enumerate(plan.spec.images[1:], 1):
            side = plan.spec.crop_of(view)[0]
            crops[name] = _moved(plan.spec, images, epochs, np.maximum(indices, 0), view)[:, :side, :side]
        return {**crops, "quarter": quarters, "label": labels, "mask": real, "index": indices.astype(np.int32)}


def _moved(spec, images, epochs, indices, view):
    """Return view number `view` of images uint8 [c, S, S, 3], shifted cyclically and mirrored: uint8 [c, S, S, 3]."""
    size = images.shape[1]
    draws = augment.bits(spec.seed, epochs, indices, augment.of_view("crop", view))
    # At least one pixel, so that the views differ.
    down, right = ((draws >> shift) % max(1, size - 1) + 1 for shift in (0, 32))
    across = np.arange(size, dtype=np.uint64)
    rows, columns = (across + down[:, None]) % size, (across + right[:, None]) % size
    mirrored = np.broadcast_to(spec.mirrored(epochs, indices, view), len(indices))
    columns = np.where(mirrored[:, None], columns[:, ::-1], columns)
    each = np.arange(len(images))[:, None, None]
    return images[each, rows[:, :, None].astype(np.int64), columns[:, None].astype(np.int64)]
