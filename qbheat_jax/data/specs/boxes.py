"""Data spec of images with boxes: scaled at random, cropped or padded to a square, mirrored; the boxes go along."""

import functools
from dataclasses import dataclass

import numpy as np

from qbheat_jax.config import POSITIVE, RANGE, Field
from qbheat_jax.data import augment, decode
from qbheat_jax.data.specs.image import FIELDS as _IMAGE
from qbheat_jax.data.specs.image import MEAN_GREY, ImageSpec, empty, pixels

FIELDS = {
    "data.max_boxes": Field(100, "boxes an image in training, the largest ones of an image that has more", POSITIVE),
    "data.jitter": Field((0.8, 1.25), "images are scaled by a number of this range, then cropped or padded", RANGE),
    "data.flip": _IMAGE["data.flip"],
}


@dataclass(frozen=True)
class BoxesSpec(ImageSpec):
    """Images of a detector, with a list of boxes.

    The longer side is scaled to image_size. In training the scale is multiplied by a number from the range `jitter`, uniform
    in its logarithm (large-scale jitter, arXiv 2012.07177). An image larger than the square is cropped, anywhere in training;
    a smaller one lies in the top left corner, anywhere in training, and the rest is grey. `flip` mirrors half of the training
    images. `count` is the length of the list; of an image with more boxes the largest are kept. A batch also has

        boxes    float32 [B, count, 4]  corners in pixels of the batch's image, see qbheat_jax.ops.boxes
        classes  int32 [B, count]       -1 for padding
        scale    float32 [B, 2]         pixels of the batch's image to one of the original, down and right; outside training
                                        both have the same top left corner
    """

    jitter: tuple = (1.0, 1.0)
    count: int = 100

    annotation = "boxes"
    cacheable = False

    @classmethod
    def of(cls, config):
        """Return the spec of a training config with `data.max_boxes` and `data.jitter`."""
        given = config.data
        shown = {"flip": given.flip, "jitter": tuple(given.jitter), "count": given.max_boxes}
        return cls(config.image_size, config.seed, (0,), True, **shown)

    def empty(self, count):
        return {
            **empty(count, {"image": self.image_size}),
            "boxes": np.zeros((count, self.count, 4), np.float32),
            "classes": np.full((count, self.count), -1, np.int32),
            "scale": np.ones((count, 2), np.float32),
        }

    def prepare(self, out, k, data, label, epoch, index, jpeg_window=None):
        """As `ImageSpec.prepare`; `label` is the example's `Boxes`. Images are decoded whole."""
        return functools.partial(self._put, out, k, data, label, epoch, index)

    def _put(self, out, k, data, label, epoch, index):
        image = pixels(data, label.size)
        if image.shape[:2] != label.size:
            have, said = ("{} x {}".format(*size[::-1]) for size in (image.shape[:2], label.size))
            raise decode.BadImage(f"it has {have} pixels but is annotated as {said}")
        scaled, offset = self.place(epoch, index, *label.size)
        scale = np.array(scaled) / label.size
        out["image"][k] = paste(image, scaled, offset, self.image_size)
        boxes = label.moved(offset, scale, (self.image_size, self.image_size))
        if self.mirrored(epoch, index):
            out["image"][k] = augment.flip(out["image"][k])
            boxes = boxes.flipped()
        out["boxes"][k], out["classes"][k] = boxes.padded(self.count)
        out["scale"][k] = scale
        out["mask"][k] = True

    def place(self, epoch, index, height, width):
        """Draw the scale and position of an image in the square; both are fixed outside training.

        Returns:
          ((height, width) of the scaled image, (y, x) of its top left corner, negative where the image is cropped).
        """
        longer, factor = max(height, width), 1.0
        draws = augment.rng(self.seed, epoch, index, "crop").random(3) if self.train else np.zeros(3)
        if self.train:
            low, high = np.log(self.jitter)
            factor = float(np.exp(low + (high - low) * draws[0]))
        scaled = tuple(max(1, round(side * factor * self.image_size / longer)) for side in (height, width))
        return scaled, tuple(int(draw * (self.image_size - side)) for draw, side in zip(draws[1:], scaled))


def paste(image, scaled, offset, size):
    """Return a grey square uint8 [size, size, 3] with an image pasted into it. Only the visible part is resized.

    Args:
      image: uint8 [H, W, 3].
      scaled: (height, width) that the whole image is scaled to.
      offset: (y, x) of its top left corner in the square.
      size: pixels a side of the square.
    """
    out = np.full((size, size, 3), MEAN_GREY, np.uint8)
    spans = [_seen(o, s, size) for o, s in zip(offset, scaled)]
    window = [(begin - o) * n / s for (begin, end), o, s, n in zip(spans, offset, scaled, image.shape)]
    until = [(end - o) * n / s for (begin, end), o, s, n in zip(spans, offset, scaled, image.shape)]
    (top, bottom), (left, right) = spans
    box = (window[1], window[0], until[1], until[0])
    out[top:bottom, left:right] = augment.resize_window(image, box, (bottom - top, right - left))
    return out


def _seen(offset, side, size):
    """Return (begin, end) of the square's pixels along an axis that show the image."""
    return max(0, offset), min(size, offset + side)
