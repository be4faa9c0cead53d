"""Data spec of one crop an image: how an example is made, what a batch holds. No tensorflow, no jax, no state."""

from dataclasses import dataclass, replace

import numpy as np

from qbheat_jax.config import FRACTION_RANGE, RANGE, Field
from qbheat_jax.data import augment, decode, placement

# What stands in for an image that cannot be decoded, and for padding: ImageNet's mean, so that it is near zero after
# normalisation. `mask` is False there.
MEAN_GREY = (124, 116, 104)

# Entries of a batch that the train step does not read.
UNTRAINED = ("index", "scale")

FIELDS = {
    "data.crop_scale": Field((0.2, 1.0), "share of the image's area that a random-resized-crop keeps", FRACTION_RANGE),
    "data.crop_ratio": Field((3 / 4, 4 / 3), "its aspect ratio", RANGE),
    "data.flip": Field(True, "mirror half of the images"),
}


@dataclass(frozen=True)
class ImageSpec:
    """One crop of every image.

    Args:
      image_size: Pixels a side of the crops.
      seed: Root of the draws.
      placements: Placement indices 0..8 that the visible quarter is drawn from.
      train: Crop and mirror at random. Otherwise an image of image_size x image_size is taken as it is, of another one the
        shorter side is scaled to image_size / 0.875 and the centre cut out, in every epoch alike.
      crop_scale, crop_ratio: Ranges of the random crop, see `augment.random_resized_crop_box`.
      flip: Mirror half of the training images.
    """

    image_size: int
    seed: int = 0
    placements: tuple = (0,)
    train: bool = False
    crop_scale: tuple = (1.0, 1.0)
    crop_ratio: tuple = (1.0, 1.0)
    flip: bool = False

    # Names of a batch's crops. Every crop has draws of its own, by its place in this tuple.
    images = ("image",)
    # Name of the source's method that gives an example's annotation, such as "boxes"; empty: its label is all.
    annotation = ""
    # Entry of a batch that a probe learns.
    answer = "label"
    # Whether `device_cache` can make these batches.
    cacheable = True

    @classmethod
    def of(cls, config, placements=(0,), **fields):
        """Return the spec of a training config. fields: of a subclass."""
        crop = {name: tuple(config.data[name]) for name in ("crop_scale", "crop_ratio")}
        return cls(config.image_size, config.seed, placements, True, **crop, flip=config.data.flip, **fields)

    def evaluation(self):
        """Return the spec of the same images as they are evaluated: not augmented."""
        return replace(self, train=False)

    def augmented(self, shown, seed):
        """Return the spec of the same examples, augmented by draws of `seed`. shown: fields of the section `data`."""
        return replace(
            self, seed=seed, train=True, crop_scale=shown.crop_scale, crop_ratio=shown.crop_ratio, flip=shown.flip
        )

    def shapes(self, batch_size):
        """Return {name: ShapeDtypeStruct} of what a step takes of a global batch."""
        import jax  # not at the top: `data` imports without jax

        kept = {name: array for name, array in self.empty(0).items() if name not in UNTRAINED}
        return {name: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype) for name, x in kept.items()}

    def check(self, source, split):
        """Raise UserError where the source lacks what the batches hold."""
        if self.annotation:
            getattr(source, self.annotation)(split, 0)

    def classes(self, source):
        """Return the names of the classes of what a probe learns, or None."""
        return source.class_names

    def fetch(self, source, split, index):
        """Return (data, label or annotation, name) of example `index` of a split, see `Source.fetch`."""
        data, label, name = source.fetch(split, index)
        return data, getattr(source, self.annotation)(split, index) if self.annotation else label, name

    def crop_of(self, view):
        """Return (pixels a side, range of the share of the image's area) of one of the crops."""
        del view
        return self.image_size, self.crop_scale

    def box(self, epoch, index, height, width, view=0):
        """Return (top, left, height, width) of the part of a height x width image that an example's crop shows."""
        size, scale = self.crop_of(view)
        if not self.train:
            return augment.centre_box(height, width, size)
        generator = augment.rng(self.seed, epoch, index, augment.of_view("crop", view))
        return augment.random_resized_crop_box(generator, height, width, scale, self.crop_ratio)

    def draws(self, epochs, indices, view=0):
        """Return the random numbers float64 [c, 22] by which `box` chooses, of many examples (int64 [c], int64 [c])."""
        return augment.uniforms(self.seed, epochs, indices, augment.of_view("crop", view), 22)

    def image(self, data, epoch, index):
        """Return the first crop of encoded bytes or uint8 [H, W, 3 or 1]: uint8 [image_size, image_size, 3].

        Raises `decode.BadImage`.
        """
        return self._crop(data, epoch, index)()

    def _crop(self, data, epoch, index, jpeg_window=None, view=0):
        """Return a function that makes one crop. Headers are read and numbers drawn before it is called."""

        def box_of(height, width):
            return self.box(epoch, index, height, width, view)

        window_of, mirrored, size = None, bool(self.mirrored(epoch, index, view)), self.crop_of(view)[0]
        if isinstance(data, np.ndarray):
            data = as_rgb(data)
        elif jpeg_window is not None:
            window_of = jpeg_window(data, box_of, size)

        def make():
            window = None if window_of is None else window_of()
            if window is not None:
                return augment.resize(window, size, mirrored)
            image = data if isinstance(data, np.ndarray) else decode.decode(data)
            return augment.crop_resize(image, box_of(*image.shape[:2]), size, mirrored)

        return make

    def mirrored(self, epoch, index, view=0):
        """Return whether a crop of the example (or of each of int64 [c]) is mirrored."""
        return self.train and self.flip and augment.flips(self.seed, epoch, index, augment.of_view("flip", view))

    def prepare(self, out, k, data, label, epoch, index, jpeg_window=None):
        """Return a function that writes an example to row k of a chunk made by `empty`.

        jpeg_window: as in data/jpeg.py; None decodes whole images. This method and the function raise `decode.BadImage`.
        """
        out["label"][k] = label
        crops = [(key, self._crop(data, epoch, index, jpeg_window, view)) for view, key in enumerate(self.images)]

        def put():
            for key, make in crops:
                out[key][k] = make()
            out["mask"][k] = True

        return put

    def empty(self, count):
        """Return a chunk of `count` padding examples to be filled in: every key of a batch, with its shape and dtype."""
        return empty(count, {name: self.crop_of(view)[0] for view, name in enumerate(self.images)})

    def quarters(self, epochs, indices):
        """Return the placements int32 [c] of examples (int64 [c], int64 [c]); outside training alike in every epoch."""
        return placement.draw(self.seed, epochs if self.train else np.zeros_like(epochs), indices, self.placements)


def pixels(content, size=None):
    """Return uint8 [H, W, 3] of what a source fetches: encoded bytes or decoded pixels. size: as in `decode.decode`."""
    return as_rgb(content) if isinstance(content, np.ndarray) else decode.decode(content, size)


def as_rgb(array):
    """Return uint8 [H, W, 3] of decoded pixels uint8 [H, W], [H, W, 1] or [H, W, 3]. Raises `decode.BadImage`."""
    if array.ndim == 2:
        array = array[..., None]
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3):
        raise decode.BadImage(f"decoded pixels of shape {array.shape} and type {array.dtype}, not uint8 grey or RGB")
    return np.broadcast_to(array, (*array.shape[:2], 3))


def empty(count, sizes):
    """Return a chunk of `count` padding examples to be filled in. sizes: {name of a crop: its pixels a side}."""
    row = np.array(MEAN_GREY, np.uint8)
    return {
        # By rows, which numpy copies a hundred times as fast as pixels.
        **{
            name: np.full((count, size, 3 * size), np.tile(row, size)).reshape(count, size, size, 3)
            for name, size in sizes.items()
        },
        "quarter": np.zeros(count, np.int32),
        "label": np.full(count, -1, np.int32),
        "mask": np.zeros(count, bool),
        "index": np.full(count, -1, np.int32),
    }


def build(spec, fetch, epochs, indices, bad, jpeg_window=None, out=None):
    """Return a chunk of a batch: `out`, made by `spec.empty`, filled in.

    Args:
      spec: ImageSpec or a subclass, which defines the entries of the chunk.
      fetch: Function of (k, index) that returns (data, label, name) of the example at row k.
      epochs, indices: int64 [c]; index -1 is padding.
      bad: `BadFiles` that gets what cannot be read or decoded; such examples stay masked.
      jpeg_window: As of `ImageSpec.prepare`.
      out: Chunk to fill in; None makes one.
    """
    out = spec.empty(len(indices)) if out is None else out
    out["quarter"][:] = spec.quarters(epochs, np.maximum(indices, 0))
    puts = []
    for k, (epoch, index) in enumerate(zip(epochs.tolist(), indices.tolist())):
        if index < 0:
            continue
        out["index"][k] = index
        with _noted(bad, f"example {index}") as note:
            data, label, note.name = fetch(k, index)
            puts.append((note.name, spec.prepare(out, k, data, label, epoch, index, jpeg_window)))
    # Pixels come last. Each image evicts the interpreter's own data from the core's caches; alternating the two costs a
    # tenth of the time.
    for name, put in puts:
        with _noted(bad, name):
            put()
    return out


class _noted:
    """Context in which files that cannot be read or decoded go to `bad`, under their own name or else under `name`."""

    def __init__(self, bad, name):
        self.bad, self.name = bad, name

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if not isinstance(error, (decode.BadImage, OSError)):
            return False
        self.bad.add(getattr(error, "filename", None) or self.name, getattr(error, "strerror", None) or error)
        return True
