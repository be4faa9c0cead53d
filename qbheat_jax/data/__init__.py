"""Iterators over batches of images or clips. Neither this module nor `synthetic` batches import tensorflow.

A batch is a dict of numpy arrays, this process's share of a global batch. A data spec (`specs`) defines its entries. Always:

    image    uint8 [B, S, S, 3]
    quarter  int32 [B]   index of the visible block's placement, 0..8 (see qbheat_jax.ops.quarters)
    label    int32 [B]   -1 where there is none
    mask     bool [B]    False for padding and for images that could not be decoded
    index    int32 [B]   number of the example in its split, -1 for padding

`ViewsSpec` adds image2, image3, ...; those of `CropsSpec` may be smaller. `BoxesSpec` adds boxes, classes and scale.
`MasksSpec` adds target. Images of `ClipsSpec` are uint8 [B, 2, T, S, S, 3], with the axes (RGB, event) and time. With a
`device_cache.DeviceCache` the iterator returns global batches instead, as arrays on the cache's mesh, and needs no tensorflow.
"""

from qbheat_jax.data.bad_files import BadFiles
from qbheat_jax.data.batches import NumpyBatches, PlainBatches, Plan
from qbheat_jax.data.sources import describe, open_source
from qbheat_jax.data.sources.synthetic import Synthetic
from qbheat_jax.data.specs.boxes import BoxesSpec
from qbheat_jax.data.specs.clips import ClipsSpec
from qbheat_jax.data.specs.crops import CropsSpec
from qbheat_jax.data.specs.image import ImageSpec
from qbheat_jax.data.specs.masks import MasksSpec
from qbheat_jax.data.specs.views import ViewsSpec
from qbheat_jax.errors import UserError

__all__ = [
    "BadFiles",
    "BoxesSpec",
    "ClipsSpec",
    "CropsSpec",
    "ImageSpec",
    "MasksSpec",
    "ViewsSpec",
    "describe",
    "eval_batches",
    "open_source",
    "train_batches",
]


def train_batches(
    source,
    spec,
    *,
    split,
    batch_size,
    position=0,
    process_index=0,
    process_count=1,
    workers=0,
    prefetch=2,
    bad=None,
    cache=None,
    rows=None,
):
    """Return an endless iterator over this process's training batches.

    Every epoch shows every example once, in an order of its own. The stream of examples is a pure function of
    (spec, position), whatever `process_count`, `workers` and `prefetch` are. The iterator's `.position` is that
    of the next batch.

    Args:
      source: Data source, see `open_source`.
      spec: ImageSpec or a subclass, with `train` set.
      split: Name of the split.
      batch_size: Examples of a global batch.
      position: The first example's place in the run's global stream.
      process_index, process_count: This process's part of the batch, of equal parts; used if `rows` is None.
      workers: Decoding threads; 0 for one a core.
      prefetch: Batches made ahead.
      bad: `BadFiles`, checked after every batch; without one, bad files are only logged.
      cache: `DeviceCache` of the split, which gives the same stream as global batches on its mesh.
      rows: int [n], this process's rows of the global batch, see `device_mesh.rows`.

    Raises:
      UserError: an unknown split, fewer images than a batch, or a batch that the processes cannot share.
    """
    plan = Plan(source, split, spec, batch_size, process_index, process_count, bad, start=position, rows=rows)
    return _batches(plan, workers, prefetch, cache)


def eval_batches(
    source,
    spec,
    *,
    split,
    batch_size,
    epochs=1,
    process_index=0,
    process_count=1,
    workers=0,
    prefetch=2,
    bad=None,
    cache=None,
    rows=None,
):
    """Return an iterator over this process's batches of a split in its own order, without augmentation.

    The last batch of an epoch is filled with padding (mask False), so every process yields ceil(n / batch_size) batches an
    epoch. The placement depends on (seed, index) alone.

    Args:
      spec: ImageSpec or a subclass, without `train`, see `ImageSpec.evaluation`.
      epochs: Passes over the split.

    Other arguments are those of `train_batches`. Raises UserError for an unknown split and for a batch that the processes
    cannot share.
    """
    plan = Plan(source, split, spec, batch_size, process_index, process_count, bad, epochs=epochs, rows=rows)
    return _batches(plan, workers, prefetch, cache)


def _batches(plan, workers, prefetch, cache):
    if cache is not None:
        from qbheat_jax.data.device_cache import DeviceBatches  # imports jax

        return DeviceBatches(plan, cache)
    if plan.spec.annotation and plan.source.plain:
        return PlainBatches(plan)
    if isinstance(plan.source, Synthetic):
        return NumpyBatches(plan)
    try:
        from qbheat_jax.data.pipeline import TensorflowBatches
    except ImportError as error:
        raise UserError(
            f"data.source='{plan.source.spec}' needs tensorflow ({error}): pip install tensorflow-cpu, or use "
            "data.device_cache=True or data.source='synthetic'"
        ) from error
    return TensorflowBatches(plan, workers, prefetch)
