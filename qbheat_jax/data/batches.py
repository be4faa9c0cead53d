"""Batches: the checks that every pipeline shares, and the pipelines that need no tensorflow."""

import math

import numpy as np

from qbheat_jax.data import augment
from qbheat_jax.data.bad_files import BadFiles
from qbheat_jax.data.order import Order, Slices
from qbheat_jax.data.specs.image import build, empty
from qbheat_jax.errors import UserError

# Examples that one call of the pipeline makes in a row: enough to make Python's overhead small, few enough that
# all workers have something to do.
CHUNK = 16


class Plan:
    """Which examples this process makes, in which order.

    Attributes: `source`, `split`, `spec`, `bad`, `batch_size` (global), `local` (this process's share), `start`
    (first position), `order`, `slices`, `batches` (how many there are; None without end).
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
        if rows is None:  # the process_index-th of process_count equal parts
            share = batch_size // process_count
            rows = process_index * share + np.arange(share)
        self.slices = Slices(start, batch_size, np.asarray(rows, np.int64), CHUNK)
        self.local = self.slices.local
        self.bad = bad if bad is not None else BadFiles(1.0, n)

    def fetch(self, index):
        """Example `index` as its source has it, (data, label, name); the label is what the spec's `annotation` names."""
        data, label, name = self.source.fetch(self.split, index)
        kind = self.spec.annotation
        return data, getattr(self.source, kind)(self.split, index) if kind else label, name


class Batches:
    """Iterator over the local batches of one process.

    `position` is the global position after the last batch that was handed out: give it back as `position` to
    go on from there, with any number of processes.
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
        """(epochs int64[local], indices int64[local], -1 for padding) of the next batch; StopIteration after the last."""
        plan = self.plan
        done = (self.position - plan.start) // plan.batch_size
        if plan.batches is not None and done >= plan.batches:
            raise StopIteration
        first = done * plan.slices.per_batch
        return plan.order(np.concatenate([plan.slices.positions(first + k) for k in range(plan.slices.per_batch)]))

    def close(self):
        """Ends the iterator and what runs for it in the background."""


class PlainBatches(Batches):
    """Every example made when it is asked for, in the caller's thread: for sources that cost next to nothing."""

    def _next(self):
        epochs, indices = self._examples()
        return build(self.plan.spec, lambda _, index: self.plan.fetch(index), epochs, indices, self.plan.bad)


class NumpyBatches(Batches):
    """`synthetic`: noise by index, no augmentation, no threads, no tensorflow.

    A further view is the same noise as if cut out elsewhere: moved around by its own draw, what leaves on one side coming
    in on the other, and mirrored where the spec says so.
    """

    def _next(self):
        plan, size = self.plan, self.plan.spec.image_size
        epochs, indices = self._examples()
        real = indices >= 0
        quarters = plan.spec.quarters(epochs, np.maximum(indices, 0))
        images, labels = plan.source.gather(np.maximum(indices, 0), size)
        if not real.all():
            padding = empty(len(indices), size)
            images = np.where(real[:, None, None, None], images, padding["image"])
            labels = np.where(real, labels, padding["label"])
        crops = {"image": images}
        for view, name in enumerate(plan.spec.images[1:], 1):
            crops[name] = _moved(plan.spec, images, epochs, np.maximum(indices, 0), view)
        return {**crops, "quarter": quarters, "label": labels, "mask": real, "index": indices.astype(np.int32)}


def _moved(spec, images, epochs, indices, view):
    """Return another view of the images uint8 [c, S, S, 3] of these examples, likewise."""
    size = images.shape[1]
    draws = augment.bits(spec.seed, epochs, indices, augment.of_view("crop", view))
    # Not by nothing at all: a crop of its own.
    down, right = ((draws >> shift) % max(1, size - 1) + 1 for shift in (0, 32))
    across = np.arange(size, dtype=np.uint64)
    rows, columns = (across + down[:, None]) % size, (across + right[:, None]) % size
    mirrored = np.broadcast_to(spec.mirrored(epochs, indices, view), len(indices))
    columns = np.where(mirrored[:, None], columns[:, ::-1], columns)
    each = np.arange(len(images))[:, None, None]
    return images[each, rows[:, :, None].astype(np.int64), columns[:, None].astype(np.int64)]
