"""Decode every image of a split once, on threads, and scale it down to be cached. This module itself needs no tensorflow."""

import collections
import concurrent.futures
import dataclasses
import os

import numpy as np
from PIL import Image

from qbheat_jax.data import decode
from qbheat_jax.data.specs import image as image_lib
from qbheat_jax.errors import RUN_FAILED, UserError


@dataclasses.dataclass(frozen=True)
class Small:
    """A decoded and shrunk example.

    Attributes:
      row: index in the split.
      height, width: size of the original image; 1 x 1 if it is bad.
      label: int, -1 for none.
      image: uint8 [h, w, 3], or None if it could not be read or decoded.
      name: name for messages.
      reason: why the image is bad; "" otherwise.
    """

    row: int
    height: int
    width: int
    label: int
    image: np.ndarray | None
    name: str
    reason: str = ""


def read(source, split, rows, limit, workers):
    """Yield a `Small` for each row, in order, with axes of at most `limit` pixels.

    Args:
      source: `sources.base.Source`.
      split: name of the split.
      rows: ascending ints.
      limit: pixels.
      workers: number of threads; 0 for one per core.
    """
    if source.random_access:
        return _ahead(lambda row: _small(row, lambda: source.fetch(split, row), limit), rows, workers)
    stream = _stream(source, split, rows)
    return _ahead(lambda item: _small(item[3], lambda: item[:3], limit), stream, workers)


def shrink(image, limit):
    """Scale each axis of uint8 [H, W, 3] that is longer than `limit` down to it, antialiased bicubic."""
    height, width = (min(side, limit) for side in image.shape[:2])
    if (height, width) == image.shape[:2]:
        return image
    picture = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))


def _small(row, fetch, limit):
    label, name = -1, f"example {row}"
    try:
        content, label, name = fetch()
        image = image_lib.pixels(content)
        return Small(row, *image.shape[:2], label, shrink(image, limit), name)
    except (decode.BadImage, OSError) as error:
        name, reason = getattr(error, "filename", None) or name, getattr(error, "strerror", None) or error
        return Small(row, 1, 1, label, None, str(name), str(reason))


def _ahead(function, items, workers):
    """Yield function(item) for each item in order, computed ahead by threads."""
    workers = workers or os.cpu_count() or 1
    executor = concurrent.futures.ThreadPoolExecutor(workers, "qbheat-decode")
    waiting = collections.deque()
    try:
        for item in items:
            waiting.append(executor.submit(function, item))
            if len(waiting) > 8 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        # Do not wait for threads, which may hang on a disk. Threads are only left after an error.
        executor.shutdown(wait=False, cancel_futures=True)


def _stream(source, split, rows):
    """Yield (content, label, name, row) for rows of a source that only streams, which is always `tfds:`."""
    from qbheat_jax.data.cpu_tensorflow import tf

    wanted = set(rows)
    try:
        everything = source.stream(split, seed=0, epoch=0, shuffle=False, first=0, keep=(0, 1, (0,)))
        for example in everything:
            if example[3] in wanted:
                wanted.discard(example[3])
                yield example
    except tf.errors.OpError as error:
        reason = " ".join((error.message or type(error).__name__).split())[:300]
        raise UserError(f"data.source='{source.spec}' cannot be read: {reason}", exit_code=RUN_FAILED) from error
    if wanted:
        raise UserError(
            f"data.source='{source.spec}' split '{split}' ended early: it should have {source.splits[split]} images; prepare "
            "the data set again"
        )
