"""Every image of a split once, decoded by Pillow on threads and small enough to be kept. No tensorflow of its own."""

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
    """Example `row` of a split: `image` uint8[h, w, 3] of an original of height x width pixels.

    Where it could not be read or decoded, `image` is None, the size 1 x 1, and `name`, `reason` say what and why.
    """

    row: int
    height: int
    width: int
    label: int
    image: np.ndarray | None
    name: str
    reason: str = ""


def read(source, split, rows, limit, workers):
    """Yields a `Small` for each of `rows` (ints, ascending), in order, each axis at most `limit` pixels long.

    `workers`: threads, 0 for one a core.
    """
    if source.random_access:
        return _ahead(lambda row: _small(row, lambda: source.fetch(split, row), limit), rows, workers)
    stream = _stream(source, split, rows)
    return _ahead(lambda item: _small(item[3], lambda: item[:3], limit), stream, workers)


def shrink(image, limit):
    """uint8[H, W, 3] with each axis longer than `limit` scaled down to it: bicubic with antialiasing."""
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
    """Yields function(item) for every item in order, worked out by threads a little ahead."""
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
        # Without a wait for threads that a disk keeps waiting: there is something to wait for after an error alone.
        executor.shutdown(wait=False, cancel_futures=True)


def _stream(source, split, rows):
    """(content, label, name, row) of the rows of a source that can only be read in order; such a source is tfds."""
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
            f"data.source='{source.spec}' split '{split}' ended early: it should have {source.splits[split]} images; "
            "prepare the data set again"
        )
