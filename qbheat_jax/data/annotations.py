"""Transform the boxes of an image along with it: crops, mirroring, padding to a fixed length. numpy only.

Corners are float32 [k, 4], (left, top, right, bottom) in pixels, see `qbheat_jax.ops.boxes`.
"""

import dataclasses

import numpy as np

# A box cut by the window's border is kept if at least this fraction of its area, and this many pixels a side, remain.
MIN_FRACTION, MIN_SIDE = 0.2, 1.0


@dataclasses.dataclass(frozen=True)
class Boxes:
    """The boxes of one image.

    Attributes:
      corners: float32 [k, 4].
      classes: int32 [k].
      crowd: bool [k]; the box surrounds many objects of its class, as in COCO. Evaluation neither requires it nor counts
        detections in it as wrong, and training does not use it.
      size: (height, width) of the image.
    """

    corners: np.ndarray
    classes: np.ndarray
    crowd: np.ndarray
    size: tuple

    def __len__(self):
        return len(self.classes)

    def kept(self, rows):
        """Return only the boxes of `rows` (bool [k] or int [m])."""
        return dataclasses.replace(self, corners=self.corners[rows], classes=self.classes[rows], crowd=self.crowd[rows])

    def flipped(self):
        """Return the boxes of the image mirrored left to right."""
        left, top, right, bottom = self.corners.T
        width = np.float32(self.size[1])
        return dataclasses.replace(self, corners=np.stack([width - right, top, width - left, bottom], -1))

    def moved(self, offset, scale, size):
        """Return the boxes of the scaled and shifted image, cut to an image of `size`.

        A box is dropped if less than MIN_FRACTION of its area, or less than MIN_SIDE pixels of a side, remains.

        Args:
          offset, scale: (y, x); each coordinate becomes scale * coordinate + offset.
          size: (height, width) of the new image.
        """
        factors, shift = np.tile(scale[::-1], 2), np.tile(offset[::-1], 2)
        whole = (self.corners * factors + shift).astype(np.float32)
        cut = clip(whole, size)
        sides, before = cut[:, 2:] - cut[:, :2], whole[:, 2:] - whole[:, :2]
        left = sides.prod(1) >= MIN_FRACTION * before.prod(1)
        # Keep an uncut box, however small it is.
        stays = (cut == whole).all(1) | (left & (sides >= MIN_SIDE).all(1))
        return dataclasses.replace(self, corners=cut, size=tuple(size)).kept(stays)

    def padded(self, count):
        """Return (corners float32 [count, 4], classes int32 [count]) of the boxes that are not crowds.

        If there are more than `count`, the largest are kept. Empty slots have box 0 and class -1.
        """
        own = self.kept(~self.crowd)
        if len(own) > count:
            sides = own.corners[:, 2:] - own.corners[:, :2]
            own = own.kept(np.sort(np.argsort(-sides.prod(1), kind="stable")[:count]))
        corners, classes = np.zeros((count, 4), np.float32), np.full(count, -1, np.int32)
        corners[: len(own)], classes[: len(own)] = own.corners, own.classes
        return corners, classes


def clip(corners, size):
    """Cut corners [k, 4] at the borders of an image of `size` (height, width)."""
    height, width = size
    return np.clip(corners, 0, np.array([width, height, width, height], np.float32)).astype(np.float32)


def none(size):
    """Return the `Boxes` of an image without objects."""
    return Boxes(np.zeros((0, 4), np.float32), np.zeros(0, np.int32), np.zeros(0, bool), tuple(size))


def coco_format(found, class_names, file_name):
    """Convert the boxes of a split to a dict in COCO's format, where image i has id i and class c has id c.

    Args:
      found: list of `Boxes`, one per image.
      class_names: list of str.
      file_name: function (i) -> str.
    """
    images, annotations = [], []
    for i, own in enumerate(found):
        height, width = map(int, own.size)
        images.append({"id": i, "file_name": file_name(i), "height": height, "width": width})
        for corners, c, crowd in zip(own.corners.tolist(), own.classes.tolist(), own.crowd.tolist()):
            left, top, right, bottom = corners
            box = [left, top, right - left, bottom - top]
            one = {"id": len(annotations) + 1, "image_id": i, "category_id": c, "bbox": box, "iscrowd": int(crowd)}
            annotations.append({**one, "area": box[2] * box[3]})
    categories = [{"id": c, "name": name} for c, name in enumerate(class_names)]
    return {"images": images, "annotations": annotations, "categories": categories}
