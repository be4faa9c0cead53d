"""One example: what the source holds -> image, label, quarter, mask. No tensorflow, and no state."""

from dataclasses import dataclass

import numpy as np

from qbheat_jax.data import augment, decode, placement

# What stands in for an image that cannot be decoded, and for padding: ImageNet's mean, so that it is near zero after
# normalisation. `mask` is False there.
MEAN_GREY = (124, 116, 104)

IMAGES = ("image", "image2")


@dataclass(frozen=True)
class Recipe:
    """How the images of a split become what the model takes.

    `image_size` in pixels; `seed` int; `placements` tuple of placement indices 0..8. `train` switches to random
    crops (`crop_scale`, `crop_ratio` as in augment.random_resized_crop_box) and mirroring (`flip`); otherwise the
    centre is cut out and the epoch does not matter. `views`: 2 for a second random crop of every training image, which
    its own draws place and mirror; the first is the same with and without it.
    """

    image_size: int
    seed: int
    placements: tuple
    train: bool
    crop_scale: tuple = (1.0, 1.0)
    crop_ratio: tuple = (1.0, 1.0)
    flip: bool = False
    views: int = 1
    boxed = False  # whether examples have boxes, see `boxed.BoxRecipe`

    @property
    def images(self):
        """Under which keys a batch has its crops."""
        return IMAGES[: self.views]

    def box(self, epoch, index, height, width, view=0):
        """(top, left, height, width) of the part of a height x width image that this example shows."""
        if not self.train:
            return augment.centre_box(height, width, self.image_size)
        generator = augment.rng(self.seed, epoch, index, ("crop", "crop2")[view])
        return augment.random_resized_crop_box(generator, height, width, self.crop_scale, self.crop_ratio)

    def draws(self, epochs, indices, view=0):
        """Return the random numbers float64 [c, 22] by which `box` chooses, of many examples (int64 [c], int64 [c])."""
        return augment.uniforms(self.seed, epochs, indices, ("crop", "crop2")[view], 22)

    def image(self, data, epoch, index):
        """Encoded bytes, or uint8[H, W, 3 or 1], -> uint8[image_size, image_size, 3]. Raises `decode.BadImage`."""
        return self._crop(data, epoch, index)()

    def _crop(self, data, epoch, index, jpeg_window=None, view=0):
        """The function that makes `image`. What is read of a header and drawn is so before it is called."""

        def box_of(height, width):
            return self.box(epoch, index, height, width, view)

        window_of, mirrored = None, bool(self.mirrored(epoch, index, view))
        if isinstance(data, np.ndarray):
            data = as_rgb(data)
        elif jpeg_window is not None:
            window_of = jpeg_window(data, box_of)

        def make():
            window = None if window_of is None else window_of()
            if window is not None:
                return augment.resize(window, self.image_size, mirrored)
            image = data if isinstance(data, np.ndarray) else decode.decode(data)
            return augment.crop_resize(image, box_of(*image.shape[:2]), self.image_size, mirrored)

        return make

    def mirrored(self, epoch, index, view=0):
        """Whether the example (or each of int64[c]) is mirrored."""
        return self.train and self.flip and augment.flips(self.seed, epoch, index, ("flip", "flip2")[view])

    def prepare(self, out, k, data, label, epoch, index, jpeg_window=None):
        """The function that puts an example in its place k of a chunk that `empty` made.

        `jpeg_window` as in data/jpeg.py, or None to decode whole images. Both it and its making raise `decode.BadImage`.
        """
        out["label"][k] = label
        crops = [(key, self._crop(data, epoch, index, jpeg_window, view)) for view, key in enumerate(self.images)]

        def put():
            for key, make in crops:
                out[key][k] = make()
            out["mask"][k] = True

        return put

    def empty(self, count):
        """`count` padding examples, to be filled in: every key of a batch, with its shape and type."""
        return empty(count, self.image_size, self.images)

    def quarters(self, epochs, indices):
        """int64[c], int64[c] -> int32[c] placements; outside training the same in every epoch."""
        return placement.draw(self.seed, epochs if self.train else np.zeros_like(epochs), indices, self.placements)


def pixels(content, size=None):
    """What a source fetches, encoded bytes or decoded pixels -> uint8[H, W, 3]. `size`: as of `decode.decode`."""
    return as_rgb(content) if isinstance(content, np.ndarray) else decode.decode(content, size)


def as_rgb(array):
    """Decoded pixels uint8[H, W], uint8[H, W, 1] or uint8[H, W, 3] -> uint8[H, W, 3]. Raises `decode.BadImage`."""
    if array.ndim == 2:
        array = array[..., None]
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3):
        raise decode.BadImage(f"decoded pixels of shape {array.shape} and type {array.dtype}, not uint8 grey or RGB")
    return np.broadcast_to(array, (*array.shape[:2], 3))


def empty(count, image_size, images=IMAGES[:1]):
    """A batch of `count` padding examples, to be filled in. `images`: the keys of its crops."""
    row = np.tile(np.array(MEAN_GREY, np.uint8), image_size)
    return {
        # By rows, which numpy copies a hundred times as fast as pixels.
        **{name: np.full((count, image_size, row.size), row).reshape(count, image_size, -1, 3) for name in images},
        "quarter": np.zeros(count, np.int32),
        "label": np.full(count, -1, np.int32),
        "mask": np.zeros(count, bool),
        "index": np.full(count, -1, np.int32),
    }


def build(recipe, fetch, epochs, indices, bad, jpeg_window=None, out=None):
    """One chunk of a batch: `out`, as `recipe.empty` gives it, filled in.

    `fetch(k, index) -> (data, label, name)` gives the example at place k of the chunk; `epochs`, `indices` int64[c],
    index -1 for padding. What cannot be read or decoded goes to `bad` and leaves a masked example.
    Returns image (and image2) uint8[c, S, S, 3], quarter int32[c], label int32[c], mask bool[c], index int32[c]; what a
    `boxed.BoxRecipe` returns is said there.
    """
    out = recipe.empty(len(indices)) if out is None else out
    out["quarter"][:] = recipe.quarters(epochs, np.maximum(indices, 0))
    puts = []
    for k, (epoch, index) in enumerate(zip(epochs.tolist(), indices.tolist())):
        if index < 0:
            continue
        out["index"][k] = index
        with _noted(bad, f"example {index}") as note:
            data, label, note.name = fetch(k, index)
            puts.append((note.name, recipe.prepare(out, k, data, label, epoch, index, jpeg_window)))
    # Only now the pixels: each image drives what the interpreter needs for the rest out of the core's caches, which costs a
    # tenth of the time where the two alternate.
    for name, put in puts:
        with _noted(bad, name):
            put()
    return out


class _noted:
    """Within it, what cannot be read or decoded is noted in `bad` under `name`, or that of the file it says itself."""

    def __init__(self, bad, name):
        self.bad, self.name = bad, name

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if not isinstance(error, (decode.BadImage, OSError)):
            return False
        self.bad.add(getattr(error, "filename", None) or self.name, getattr(error, "strerror", None) or error)
        return True
