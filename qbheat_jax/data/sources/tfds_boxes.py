"""`tfds:` data sets with boxes, such as tfds:coco/2017: those with a feature `objects` and no label for whole images."""

import functools

import numpy as np

from qbheat_jax.data import annotations as annotations_lib
from qbheat_jax.data import decode
from qbheat_jax.data.sources import tfds as tfds_lib
from qbheat_jax.errors import UserError

_OBJECTS = "objects"


class TfdsBoxes(tfds_lib.Tfds):
    """Images with boxes; `label` is -1. Boxes are read by index, so the files must allow random access.

    tfds stores boxes as (top, left, bottom, right), in fractions of the image's height and width.
    """

    boxed = True

    def __init__(self, spec, builder):
        super().__init__(spec, builder)
        self.class_names = list(builder.info.features[_OBJECTS]["label"].names)
        # Pixels and boxes of an example are read one after the other, by as many threads as decode.
        self._example = functools.lru_cache(maxsize=64)(self._example)
        self._truth = functools.cache(self._truth)

    def boxes(self, split, index):
        if not self.random_access:
            raise UserError(
                f"data.source='{self.spec}' is read as a stream, which has no boxes by index: prepare it with 'tfds build "
                f"{self.spec[5:]} --file_format=array_record'"
            )
        example = self._example(self.split(split), index)
        size, found = _size(self._content(example)[0]), example[_OBJECTS]
        if not len(found["label"]):
            return annotations_lib.none(size)
        top, left, bottom, right = (
            np.asarray(found["bbox"], np.float32).T * np.tile(np.array(size, np.float32), 2)[:, None]
        )
        corners = annotations_lib.clip(np.stack([left, top, right, bottom], -1), size)
        crowd = np.asarray(found.get("is_crowd", np.zeros(len(corners))), bool)
        classes = np.asarray(found["label"], np.int32)
        # Drop boxes without a width or height.
        return annotations_lib.Boxes(corners, classes, crowd, size).kept((corners[:, 2:] > corners[:, :2]).all(1))

    def annotations(self, split):
        return self._truth(self.split(split))

    def _truth(self, split):
        found = []
        for n in range(self.splits[split]):
            try:
                found.append(self.boxes(split, n))
            except (OSError, decode.BadImage):  # skipped and counted wherever its pixels are read
                found.append(annotations_lib.none((1, 1)))
        return annotations_lib.coco_format(found, self.class_names, lambda n: f"{split}[{n}]")


def open_tfds(spec, data_dir):
    """Return the source of a spec: `TfdsBoxes` if the data set has boxes and no label for whole images, else `Tfds`."""
    import tensorflow_datasets as tfds

    builder = tfds_lib.builder_of(spec, data_dir)
    features = dict(builder.info.features.items())
    inner = dict(getattr(features.get(_OBJECTS), "feature", {}).items())
    boxed = "bbox" in inner and isinstance(inner.get("label"), tfds.features.ClassLabel)
    labelled = any(isinstance(feature, tfds.features.ClassLabel) for feature in features.values())
    return (TfdsBoxes if boxed and not labelled else tfds_lib.Tfds)(spec, builder)


def _size(data):
    """Return the upright (height, width) of an image, given as bytes or pixels."""
    if isinstance(data, np.ndarray):
        return data.shape[:2]
    image = decode.open_header(data)
    return image.size if decode.orientation(image) >= 5 else image.size[::-1]
