"""Data spec of images with masks: the whole image in a square, and the class of every pixel."""

import functools
from dataclasses import dataclass

import numpy as np

from qbheat_jax.data import augment, decode
from qbheat_jax.data.specs.image import FIELDS, ImageSpec, pixels

__all__ = ["FIELDS", "IGNORED", "MasksSpec"]

# Value of the pixels of a mask that do not count.
IGNORED = 255


@dataclass(frozen=True)
class MasksSpec(ImageSpec):
    """Images with the class of every pixel.

    The longer side is scaled to image_size. The image lies in the top left corner of the square, and the rest is grey. In
    training it is a random crop, mirrored or not, that fills the square. The image is interpolated as all images are; the
    mask takes the nearest pixel. A batch also has

        target  uint8 [B, S, S]   number of the pixel's class in the source's `mask_names`, or IGNORED
    """

    annotation = "masks"
    answer = "target"
    cacheable = False

    def check(self, source, split):
        """Raise UserError where the source has no masks."""
        if source.mask_names is None:
            source.masks(split, 0)

    def classes(self, source):
        """Return the names of the classes that `target` numbers."""
        return source.mask_names

    def empty(self, count):
        size = self.image_size
        return {**super().empty(count), "target": np.full((count, size, size), IGNORED, np.uint8)}

    def box(self, epoch, index, height, width, view=0):
        return super().box(epoch, index, height, width, view) if self.train else (0, 0, height, width)

    def scaled(self, height, width):
        """Return (height, width) of the square's part that shows a whole image of height x width pixels."""
        return tuple(max(1, round(side * self.image_size / max(height, width))) for side in (height, width))

    def prepare(self, out, k, data, label, epoch, index, jpeg_window=None):
        """As `ImageSpec.prepare`; `label` is the example's mask. Images are decoded whole."""
        return functools.partial(self._put, out, k, data, label, epoch, index)

    def _put(self, out, k, data, label, epoch, index):
        image = pixels(data, label.shape)
        if image.shape[:2] != label.shape:
            have, mask = ("{} x {}".format(*size[::-1]) for size in (image.shape[:2], label.shape))
            raise decode.BadImage(f"it has {have} pixels but its mask {mask}")
        top, left, height, width = self.box(epoch, index, *label.shape)
        down, right = (self.image_size,) * 2 if self.train else self.scaled(height, width)
        shown = augment.resize_window(image, (left, top, left + width, top + height), (down, right))
        rows, columns = top + _nearest(height, down), left + _nearest(width, right)
        if self.mirrored(epoch, index):
            shown, columns = augment.flip(shown), columns[::-1]
        out["image"][k, :down, :right] = shown
        out["target"][k, :down, :right] = label[rows[:, None], columns]
        out["mask"][k] = True


def _nearest(size, count):
    """Return the pixels int [count] of a side of `size` that are nearest to `count` equally spaced centres."""
    return ((np.arange(count) + 0.5) * size / count).astype(int)
