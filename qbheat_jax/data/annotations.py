"""The boxes of an image through what is done to it: windows, mirror images, lists of one length. numpy alone.

Corners are float32 [k, 4], (left, top, right, bottom) in pixels, see qbheat_jax.ops.boxes.
"""

import dataclasses

import numpy as np

# Of a box that is cut by the window's border, the share of its area that must be left, and the pixels a side.
LEAST_SHARE, LEAST_SIDE = 0.2, 1.0


@dataclasses.dataclass(frozen=True)
class Boxes:
    """What is in one image of `size` (height, width): corners float32 [k, 4], classes int32 [k].

    `crowd` bool [k]: the box is around many of its class, as COCO has it: evaluation neither asks for it nor counts what is
    found in it as wrong, and training is not shown it.
    """

    corners: np.ndarray
    classes: np.ndarray
    crowd: np.ndarray
    size: tuple

    def __len__(self):
        return len(self.classes)

    def kept(self, rows):
        """Those of `rows` (bool [k] or int [m]) alone."""
        return dataclasses.replace(self, corners=self.corners[rows], classes=self.classes[rows], crowd=self.crowd[rows])

    def flipped(self):
        """Those of the image mirrored left to right."""
        left, top, right, bottom = self.corners.T
        width = np.float32(self.size[1])
        return dataclasses.replace(self, corners=np.stack([width - right, top, width - left, bottom], -1))

    def moved(self, offset, scale, size):
        """Those of an image that is scaled, then moved: offset, scale (y, x) -> within an image of `size` (height, width).

        What lies outside is cut off; a box goes of which less than LEAST_SHARE of its area, or a side of less than LEAST_SIDE
        pixels is left.
        """
        factors, shift = np.tile(scale[::-1], 2), np.tile(offset[::-1], 2)
        whole = (self.corners * factors + shift).astype(np.float32)
        cut = clip(whole, size)
        sides, before = cut[:, 2:] - cut[:, :2], whole[:, 2:] - whole[:, :2]
        left = sides.prod(1) >= LEAST_SHARE * before.prod(1)
        # A box that nothing was cut from may be as small as it is.
        stays = (cut == whole).all(1) | (left & (sides >= LEAST_SIDE).all(1))
        return dataclasses.replace(self, corners=cut, size=tuple(size)).kept(stays)

    def padded(self, count):
        """(float32 [count, 4], int32 [count]) of those that are no crowd, the largest ones where there are more; class -1
        and box 0 fill up."""
        own = self.kept(~self.crowd)
        if len(own) > count:
            sides = own.corners[:, 2:] - own.corners[:, :2]
            own = own.kept(np.sort(np.argsort(-sides.prod(1), kind="stable")[:count]))
        corners, classes = np.zeros((count, 4), np.float32), np.full(count, -1, np.int32)
        corners[: len(own)], classes[: len(own)] = own.corners, own.classes
        return corners, classes


def clip(corners, size):
    """Corners [k, 4] cut off at the borders of an image of `size` (height, width)."""
    height, width = size
    return np.clip(corners, 0, np.array([width, height, width, height], np.float32)).astype(np.float32)


def none(size):
    """The boxes of an image in which there is nothing."""
    return Boxes(np.zeros((0, 4), np.float32), np.zeros(0, np.int32), np.zeros(0, bool), tuple(size))


def coco_format(found, class_names, file_name):
    """A split's `Boxes`, a list with one an image, as a dict in COCO's format: image i has the id i, class c the id c.

    file_name: function of i.
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
