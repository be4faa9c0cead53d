"""Keep a split in accelerator memory: decoded once by Pillow, then cropped inside jit. No tensorflow.

Axes of an image longer than `cache_size` are scaled down to it, each axis separately. Shorter axes keep their pixels, so
the cache holds all of the image, at most squeezed. Crops, flips and placements are those of the tf.data pipeline: the host
draws boxes in pixels of the original image, a few bytes an example. All pixel work happens inside jit. If
nothing was scaled down, the images equal the pipeline's too.

The images are split over the mesh like a batch, not replicated. Each device's part shrinks as devices are added, so a split
too large for one device may fit on eight. Each process decodes only its own part. In each step, every image
of the batch moves from the device that holds it to the one that trains on it.
"""

import functools
import logging
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from qbheat_jax import device_mesh
from qbheat_jax.data import shrink
from qbheat_jax.data.batches import Batches
from qbheat_jax.data.sources.synthetic import Synthetic
from qbheat_jax.data.specs.image import MEAN_GREY
from qbheat_jax.errors import UserError
from qbheat_jax.ops import resample

_log = logging.getLogger("qbheat")

# The default `cache_size` as a multiple of the image size. Larger images are scaled twice, which changes crops of detailed
# photographs: they differ from the pipeline's by 4 grey levels on average at 8/7, by 1 at 2, and by 0.3 at 4.
DEFAULT_SIZE = 2

_GIB = 2**30
_LANES = 128
# Bytes of images that a device looks up for the others at a time.
_TRANSIT = 2**28


def of(settings, image_size, source, split, mesh):
    """Return the `DeviceCache` of a split, or None unless `data.device_cache` is set.

    Args:
      settings: the `data` section of a config.
      image_size: the model's image size, pixels a side.
      source: `sources.base.Source`.
      split: name of the split.
      mesh: the device mesh.
    """
    if not settings.device_cache:
        return None
    size = settings.cache_size or DEFAULT_SIZE * image_size
    return DeviceCache(source, split, mesh, size, settings.cache_gib, settings.workers)


class DeviceCache:
    """The images of one split on the devices of `mesh`, decoded when the first batch is requested.

    Args:
      source: `sources.base.Source`.
      split: name of the split.
      mesh: the device mesh.
      cache_size: longest side kept, in pixels.
      cache_gib: memory that the cache may take on each device, in GiB.
      workers: decoding threads; 0 for one per core.
    """

    def __init__(self, source, split, mesh, cache_size, cache_gib, workers=0):
        self.source, self.split, self.mesh = source, source.split(split), mesh
        self.cache_size, self.cache_gib, self.workers = cache_size, cache_gib, workers
        self.n = source.splits[self.split]
        self._sharding = NamedSharding(mesh, device_mesh.BATCH)  # devices along `model` hold the same images
        self._devices = mesh.shape["data"] * mesh.shape["fsdp"]
        self._images = None  # uint32 [rows, k, 128] on the mesh, see `_pack`; rows is a multiple of the devices
        self._shape = None  # (3, h, w) of each cached image
        self._sizes = None  # int32 [n, 2], (height, width) of the original images
        self._labels = None  # int32 [n]
        self._good = None  # bool [n]
        self._bad = ()  # (name, reason) of images that could not be decoded

    def load(self, bad):
        """Decode the split on the first call, and report undecodable images to `bad`.

        Args:
          bad: `BadFiles`.

        Raises:
          UserError: too many images are bad, or the images take more than `cache_gib`.
        """
        if self._images is None:
            self._load()
        for name, reason in self._bad:
            bad.add(name, reason)
        bad.check()

    def batch(self, spec, epochs, indices, batch_size):
        """Return the global batch on the mesh.

        Args:
          spec: the data spec, which draws boxes, flips and placements.
          epochs: int64 [b], for this process's examples.
          indices: int64 [b], -1 for padding.
          batch_size: global batch size.

        Returns:
          dict of arrays [batch_size, ...].
        """
        real = indices >= 0
        rows = np.where(real, indices, 0)
        local = {
            "quarter": spec.quarters(epochs, rows),
            "label": np.where(real, self._labels[rows], -1).astype(np.int32),
            "mask": real & self._good[rows],
            "index": indices.astype(np.int32),
        }
        batch = device_mesh.put_batch(local, self.mesh, batch_size)
        for view, name in enumerate(spec.images):
            shown = (rows.astype(np.int32), *self._draw(spec, epochs, rows, view))
            shown = (device_mesh.put(x, self.mesh, batch_size) for x in shown)
            batch[name] = _grey_where_masked(self.crop(*shown, spec.crop_of(view)[0]), batch["mask"])
        return batch

    def crop(self, rows, boxes, flips, size):
        """Return crops of cached images, resized to `size`.

        Args:
          rows: int32 [B], indices of images.
          boxes: float32 [B, 4], (top, left, height, width) in pixels of the cache.
          flips: bool [B], True to mirror left to right.
          size: pixels a side of the result.

        Returns:
          uint8 [B, size, size, 3]. All arrays are on the mesh.
        """
        return _crop(self._images, rows, boxes, flips, mesh=self.mesh, shape=self._shape, size=size)

    def _draw(self, spec, epochs, rows, view):
        """Return (boxes float32 [b, 4] in pixels of the cache, bool [b] mirrored), as `spec` draws them per example."""
        sizes = self._sizes[rows]
        whole = spec.train and isinstance(self.source, Synthetic) and view == 0  # synthetic images are not augmented
        examples = zip(epochs.tolist(), rows.tolist(), *sizes.T.tolist())
        boxes = [(0, 0, h, w) if whole else spec.box(epoch, row, h, w, view) for epoch, row, h, w in examples]
        boxes = np.array(boxes) * np.tile(np.minimum(sizes, self.cache_size) / sizes, 2)
        flips = np.zeros(len(rows), bool) if whole else spec.mirrored(epochs, rows, view)
        return boxes.astype(np.float32), np.broadcast_to(flips, len(rows))

    def _load(self):
        started, devices = time.perf_counter(), self._devices
        total = -(-self.n // devices) * devices
        slices = self._sharding.addressable_devices_indices_map((total,)).values()
        here = sorted({row for (part,) in slices for row in range(*part.indices(total))})
        _log.info("decoding %d of %d images of %s", sum(row < self.n for row in here), self.n, self._name)
        images, records, bad = self._decode([row for row in here if row < self.n])
        records = self._gather(records, len(here))
        self._sizes, self._labels, self._good = records[:, :2], records[:, 2], records[:, 3].astype(bool)
        elsewhere = sorted(set(np.flatnonzero(~self._good)) - set(here))
        self._bad = bad + [(f"{self._name}[{row}]", "see the log of the process that decoded it") for row in elsewhere]
        height, width = self._check_fits(*self._sizes[self._good].max(0, initial=1))

        self._shape = (3, height, width)

        @functools.cache
        def rows(begin, end):
            wanted = range(begin, end)
            array = np.zeros((len(wanted), *self._shape), np.uint8)
            for place, row in enumerate(wanted):
                if row in images:
                    image = images.pop(row)
                    array[place, :, : image.shape[0], : image.shape[1]] = image.transpose(2, 0, 1)
            return _pack(array)

        packed = (total, *_pack(np.empty((0, *self._shape), np.uint8)).shape[1:])
        self._images = jax.make_array_from_callback(
            packed, self._sharding, lambda index: rows(*index[0].indices(total)[:2])
        )
        figures = (self.n, self._name, height, width, self._images.nbytes / devices / _GIB, devices)
        seconds = time.perf_counter() - started
        _log.info("%d images of %s cached: %d x %d, %.2f GiB on each of %d devices, %.0f s", *figures, seconds)

    def _decode(self, rows):
        """Return ({row: uint8 [h, w, 3]}, int32 [len(rows), 5] of row, height, width, label, good, [(name, reason), ...])."""
        images, records, bad, largest = {}, [], [], (1, 1)
        for small in shrink.read(self.source, self.split, rows, self.cache_size, self.workers):
            records.append((small.row, small.height, small.width, small.label, small.image is not None))
            if small.image is None:
                bad.append((small.name, small.reason))
                continue
            images[small.row] = small.image
            if small.height > largest[0] or small.width > largest[1]:
                # Check at once instead of after decoding everything.
                largest = max(small.height, largest[0]), max(small.width, largest[1])
                self._check_fits(*largest)
        return images, np.array(records, np.int32).reshape(-1, 5), bad

    def _gather(self, records, most):
        """Gather each process's records, int32 [at most `most`, 5], into those of all rows, int32 [n, 4]."""
        if not self._sharding.is_fully_addressable:
            padding = np.full((most - len(records), records.shape[1]), -1, np.int32)
            records = np.asarray(multihost_utils.process_allgather(np.concatenate([records, padding])))
            records = records.reshape(-1, records.shape[-1])
        records = records[records[:, 0] >= 0]
        _, first = np.unique(records[:, 0], return_index=True)  # sorted; several processes may hold the same row
        return records[first, 1:]

    def _check_fits(self, height, width):
        """Return the cache's (height, width) for a largest image of height x width; raise UserError if it does not fit."""
        height, width = min(int(height), self.cache_size), min(int(width), self.cache_size)
        devices = self._devices
        gib = -(-self.n // devices) * _padded(3 * height * width) / _GIB
        if gib > self.cache_gib:
            raise UserError(
                f"data.device_cache=True: the {self.n} images of {self._name} take {gib * devices:.3g} GiB at {height} x "
                f"{width} pixels. That is {gib:.3g} GiB on each of {devices} devices, more than data.cache_gib="
                f"{self.cache_gib:g}: raise it, set data.cache_size below {self.cache_size}, or set data.device_cache=False"
            )
        return height, width

    @property
    def _name(self):
        return f"{self.source.spec} {self.split}"


class DeviceBatches(Batches):
    """Iterator over global batches whose arrays are on the cache's mesh; otherwise like the other pipelines' batches."""

    def __init__(self, plan, cache):
        super().__init__(plan)
        self._cache, self._loaded = cache, False

    def _next(self):
        epochs, indices = self._examples()
        if not self._loaded:
            self._cache.load(self.plan.bad)
            self._loaded = True
        return self._cache.batch(self.plan.spec, epochs, indices, self.plan.batch_size)


def _pack(images):
    """Pack images uint8 [n, 3, h, w] into uint32 [n, k, 128], padding each image's bytes with zeros.

    Devices add and send 32-bit words natively. On TPUs this layout also allows lookup along the first axis. They store the
    last two axes in tiles, and would copy a whole cache of [n, 3, 64, 64] into another layout at each step.
    """
    images = images.reshape(len(images), int(np.prod(images.shape[1:])))
    images = np.pad(images, ((0, 0), (0, _padded(images.shape[1]) - images.shape[1])))
    return images.view("<u4").reshape(len(images), images.shape[1] // (4 * _LANES), _LANES)


def _padded(count):
    """Return the packed size of an image of `count` bytes."""
    return -(-count // (4 * _LANES)) * 4 * _LANES


def _unpack(words, shape):
    """Invert `_pack` in jax: uint32 [n, k, 128] -> uint8 [n, *shape]."""
    pixels = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(len(words), -1)
    return pixels[:, : math.prod(shape)].reshape(-1, *shape)


@functools.partial(jax.jit, static_argnames=("mesh", "shape", "size"))
def _crop(images, rows, boxes, flips, *, mesh, shape, size):
    axes = device_mesh.BATCH[0]

    def local(images, *examples):
        def some(examples):
            rows, boxes, flips = examples
            planes = _unpack(_fetch(images, rows, axes), shape)
            return resample.from_planes(resample.crop_resize_planes(planes, boxes, size, flips))

        count = len(examples[0])
        most = max(1, _TRANSIT // (mesh.shape["data"] * mesh.shape["fsdp"] * 4 * math.prod(images.shape[1:])))
        chunk = max(c for c in range(1, min(count, most) + 1) if count % c == 0)
        chunks = jax.lax.map(some, [x.reshape(count // chunk, chunk, *x.shape[1:]) for x in examples])
        return chunks.reshape(count, *chunks.shape[2:])

    return jax.shard_map(local, mesh=mesh, in_specs=(device_mesh.BATCH,) * 4, out_specs=device_mesh.BATCH)(
        images, rows, boxes, flips
    )


def _fetch(images, rows, axes):
    """Return images from whichever devices hold them; runs inside shard_map.

    Each device looks up the requested images that it holds and leaves zeros for the rest. The sum over devices is then
    scattered like the batch.

    Args:
      images: this device's images, uint32 [n, k, 128].
      rows: int32 [b], global indices of the images that this device needs.
      axes: mesh axes of the batch.

    Returns:
      uint32 [b, k, 128].
    """
    wanted = jax.lax.all_gather(rows, axes, tiled=True) - jax.lax.axis_index(axes) * len(images)
    mine = (wanted >= 0) & (wanted < len(images))
    found = jnp.where(mine[:, None, None], images[jnp.where(mine, wanted, 0)], jnp.uint32(0))
    return jax.lax.psum_scatter(found, axes, scatter_dimension=0, tiled=True)


@jax.jit
def _grey_where_masked(images, mask):
    return jnp.where(mask[:, None, None, None], images, jnp.asarray(MEAN_GREY, jnp.uint8))
