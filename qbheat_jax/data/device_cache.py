"""A split kept on the accelerators: decoded once by Pillow, cropped inside jit ever after. No tensorflow.

Every image is decoded once. An axis of it that is longer than `cache_size` is scaled down to that, each axis by itself;
anything smaller is kept pixel for pixel. So all of the image is there, at most squeezed. Crops, flips and placements are
the ones that the tf.data pipeline draws: the host draws the boxes in pixels of the original image, a few bytes an example,
and what is done with pixels is done inside jit. Where nothing had to be scaled, the images are the pipeline's too.

The images are split over the mesh as a batch is, not repeated on every device: a device's share shrinks as devices are
added, so what is too large for one may fit eight, and each process decodes its own share alone. A step then sends each
image of its batch from the one device that holds it to the one that trains on it.
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

# `cache_size` over the model's image size, unless told otherwise. Pixels are scaled twice where an image is larger: of a
# photograph full of edges, crops then differ from the pipeline's by 4 grey levels in the mean at 8/7, by 1 at 2, by 0.3 at 4.
DEFAULT_SIZE = 2

_GIB = 2**30
_LANES = 128
# Bytes that a device looks out for the others at a time.
_TRANSIT = 2**28


def of(settings, image_size, source, split, mesh):
    """Return the `DeviceCache` of a split that the `data` section of a config asks for, or None."""
    if not settings.device_cache:
        return None
    size = settings.cache_size or DEFAULT_SIZE * image_size
    return DeviceCache(source, split, mesh, size, settings.cache_gib, settings.workers)


class DeviceCache:
    """The images of one split on the devices of `mesh`; they are decoded when the first batch is asked for.

    `cache_size`: the longest side kept, in pixels; `cache_gib`: the most memory of a device that it may take; `workers`:
    decoding threads, 0 for one a core.
    """

    def __init__(self, source, split, mesh, cache_size, cache_gib, workers=0):
        self.source, self.split, self.mesh = source, source.split(split), mesh
        self.cache_size, self.cache_gib, self.workers = cache_size, cache_gib, workers
        self.n = source.splits[self.split]
        self._sharding = NamedSharding(mesh, device_mesh.BATCH)  # devices along `model` hold the same images
        self._devices = mesh.shape["data"] * mesh.shape["fsdp"]
        self._images = None  # uint32[rows, k, 128] on the mesh, see `_pack`; rows are a multiple of the devices
        self._shape = None  # (3, h, w) of each
        self._sizes = None  # int32[n, 2], of the original images
        self._labels = None  # int32[n]
        self._good = None  # bool[n]
        self._bad = ()  # (name, reason) of what could not be decoded

    def load(self, bad):
        """Decodes the split if that has not been done yet, and names what could not be decoded to the `BadFiles` bad.

        Raises UserError where too much of it is bad, and where the images take more than `cache_gib`.
        """
        if self._images is None:
            self._load()
        for name, reason in self._bad:
            bad.add(name, reason)
        bad.check()

    def batch(self, spec, epochs, indices, batch_size):
        """Return the global batch on the mesh of every process's examples: epochs, indices int64 [b], index -1 for padding."""
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
            batch[name] = _grey_where_masked(self.crop(*shown, spec.image_size), batch["mask"])
        return batch

    def crop(self, rows, boxes, flips, size):
        """Parts of the images int32[B]: float32[B, 4] boxes in pixels of the cache, bool[B] mirrored; all on the mesh.

        Returns uint8[B, size, size, 3] on the mesh.
        """
        return _crop(self._images, rows, boxes, flips, mesh=self.mesh, shape=self._shape, size=size)

    def _draw(self, spec, epochs, rows, view):
        """Return (float32 [b, 4] boxes in pixels of the cache, bool [b] mirrored) of one of the data spec's views."""
        sizes = self._sizes[rows]
        whole = spec.train and isinstance(self.source, Synthetic) and view == 0  # which is not augmented
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
        images, facts, bad = self._decode([row for row in here if row < self.n])
        facts = self._gather(facts, len(here))
        self._sizes, self._labels, self._good = facts[:, :2], facts[:, 2], facts[:, 3].astype(bool)
        elsewhere = sorted(set(np.flatnonzero(~self._good)) - set(here))
        self._bad = bad + [(f"{self._name}[{row}]", "it is named by the process that met it") for row in elsewhere]
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
        words = (self.n, self._name, height, width, self._images.nbytes / devices / _GIB, devices)
        seconds = time.perf_counter() - started
        _log.info("%d images of %s cached: %d x %d, %.2f GiB on each of %d devices, %.0f s", *words, seconds)

    def _decode(self, rows):
        """({row: uint8[h, w, 3]}, int32[len(rows), 5] of row, height, width, label, good, [(name, reason), ...])."""
        images, facts, bad, largest = {}, [], [], (1, 1)
        for small in shrink.read(self.source, self.split, rows, self.cache_size, self.workers):
            facts.append((small.row, small.height, small.width, small.label, small.image is not None))
            if small.image is None:
                bad.append((small.name, small.reason))
                continue
            images[small.row] = small.image
            if small.height > largest[0] or small.width > largest[1]:
                # At once, and not when everything has been decoded.
                largest = max(small.height, largest[0]), max(small.width, largest[1])
                self._check_fits(*largest)
        return images, np.array(facts, np.int32).reshape(-1, 5), bad

    def _gather(self, facts, most):
        """The facts of all rows, int32[n, 4], from those of each process, int32[at most `most`, 5]."""
        if not self._sharding.is_fully_addressable:
            padding = np.full((most - len(facts), facts.shape[1]), -1, np.int32)
            facts = np.asarray(multihost_utils.process_allgather(np.concatenate([facts, padding])))
            facts = facts.reshape(-1, facts.shape[-1])
        facts = facts[facts[:, 0] >= 0]
        _, first = np.unique(facts[:, 0], return_index=True)  # sorted; more than one process may hold a row
        return facts[first, 1:]

    def _check_fits(self, height, width):
        """(height, width) of the cache where the largest image has height x width pixels; UserError where that is too much."""
        height, width = min(int(height), self.cache_size), min(int(width), self.cache_size)
        devices = self._devices
        gib = -(-self.n // devices) * _padded(3 * height * width) / _GIB
        if gib > self.cache_gib:
            raise UserError(
                f"data.device_cache=True: the {self.n} images of {self._name} take {gib * devices:.3g} GiB at {height} x "
                f"{width} pixels, which is {gib:.3g} on each of {devices} devices and more than config field "
                f"data.cache_gib={self.cache_gib:g}: raise it, set data.cache_size below {self.cache_size}, or "
                "data.device_cache=False"
            )
        return height, width

    @property
    def _name(self):
        return f"{self.source.spec} {self.split}"


class DeviceBatches(Batches):
    """Iterator over global batches whose arrays lie on the cache's mesh; otherwise as the other pipelines' batches."""

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
    """uint8[n, 3, h, w] -> uint32[n, k, 128], the bytes of each image in a row, filled up with zeros.

    Devices add and send words of 32 bits as they are. And a TPU, which stores the last two axes in tiles, needs no other
    layout to look images up by the first axis: with one of [n, 3, 64, 64] it would copy the whole cache at each step.
    """
    images = images.reshape(len(images), int(np.prod(images.shape[1:])))
    images = np.pad(images, ((0, 0), (0, _padded(images.shape[1]) - images.shape[1])))
    return images.view("<u4").reshape(len(images), images.shape[1] // (4 * _LANES), _LANES)


def _padded(count):
    """The bytes that an image of `count` bytes takes."""
    return -(-count // (4 * _LANES)) * 4 * _LANES


def _unpack(words, shape):
    """The inverse of `_pack`, in jax."""
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
    """Inside shard_map: this device's images [n, k, 128] and the rows int32[b] that it wants -> those images [b, k, 128].

    Every device looks out what it holds of all that are wanted, leaves the rest 0, and the sum over the devices is split as
    the batch is.
    """
    wanted = jax.lax.all_gather(rows, axes, tiled=True) - jax.lax.axis_index(axes) * len(images)
    mine = (wanted >= 0) & (wanted < len(images))
    found = jnp.where(mine[:, None, None], images[jnp.where(mine, wanted, 0)], jnp.uint32(0))
    return jax.lax.psum_scatter(found, axes, scatter_dimension=0, tiled=True)


@jax.jit
def _grey_where_masked(images, mask):
    return jnp.where(mask[:, None, None, None], images, jnp.asarray(MEAN_GREY, jnp.uint8))
