"""Crops of JPEGs by tensorflow's own operations: only the cropped part is decoded, and no interpreter runs.

Most of these functions build a graph. They take and return tensors, inside tf.data or in `window`'s compiled function.
"""

import functools
import math

import numpy as np

from qbheat_jax.data import augment, decode
from qbheat_jax.data.cpu_tensorflow import tf
from qbheat_jax.data.specs.image import MEAN_GREY

# Pixels decoded around the box. libjpeg interpolates colour between its samples, one for two pixels. Without the next
# sample the box's edges would differ from those of the whole image.
_MARGIN = 2

# Bytes of a file that `is_plain` looks through. Headers are shorter, unless they hold a large profile or thumbnail.
_HEAD = 4096
# RE2 takes no bytes above 127 in a pattern: \C stands for them.
# The end of a header, a scan of one, two or three components.
_SCAN = rb"\C*\x00(\x0C\x03\C[\x00-\x33]\C[\x00-\x33]|\x0A\x02\C[\x00-\x33]|\x08\x01)\C[\x00-\x33]\x00[\x00\x3F][\x00-\x0D]\C*"
# Metadata that may turn the image: EXIF, and what Pillow heeds of XMP.
_METADATA = rb"\C*(Exif\x00\x00|tiff:Orientation)\C*"
# EXIF whose first directory, entries of 12 bytes, has the orientation 1.
_UPRIGHT = (
    rb"\C*Exif\x00\x00"
    rb"(II\*\x00\x08\x00\x00\x00\C\C(\C{12}){0,20}?\x12\x01\x03\x00\x01\x00\x00\x00\x01\x00"
    rb"|MM\x00\*\x00\x00\x00\x08\C\C(\C{12}){0,20}?\x01\x12\x00\x03\x00\x00\x00\x01\x00\x01)\C*"
)


def window(data, box_of, size):
    """Return a function that makes the crop uint8 [size, size, 3] of a JPEG; it returns None where Pillow has to.

    The header is read at once, by Pillow. This is the way for single images, with the pixels of `crops`.

    Args:
      data: Bytes of a file.
      box_of: Function of (height, width) that returns the crop's (top, left, height, width).
      size: Pixels a side.

    Returns:
      The function, or None for what is no whole, upright JPEG of one or three colours.

    Raises:
      decode.BadImage: the header cannot be read.
    """
    if data[:2] != b"\xff\xd8" or data[-2:] != b"\xff\xd9":
        return None
    image = decode.open_header(data)
    if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L") or decode.orientation(image) != 1:
        return None
    shape, box = (image.height, image.width), box_of(image.height, image.width)

    def pixels():
        try:
            return _compiled(size)(data, shape, box).numpy()
        except tf.errors.OpError:
            return None

    return pixels


@functools.cache
def _compiled(size):
    numbers = [tf.TensorSpec(n, tf.int32) for n in (2, 4)]
    return tf.function(
        lambda data, shape, box: crop(data, shape, box, size, tf.constant(False)),
        input_signature=[tf.TensorSpec((), tf.string), *numbers],
    )


def crops(data, spec, draws, mirrored):
    """Return the crops of a JPEG, or grey images and False where Python has to make them.

    An operation fails if only the header is that of a JPEG.

    Args:
      data: string [], a file's content.
      spec: The spec whose `images` these are.
      draws: float64 [views, 22] of `spec.draws`; not read outside training.
      mirrored: bool [views].

    Returns:
      bool [], then uint8 [S, S, 3] for each view, of its own size.
    """
    sizes, scales = zip(*(spec.crop_of(view) for view in range(len(spec.images))))

    def box_of(shape, view):
        if spec.train:
            return random_box(shape, draws[view], scales[view], spec.crop_ratio)
        return centre_box(shape, sizes[view])

    def none():
        return tf.constant(False), *(tf.constant(np.full((size, size, 3), MEAN_GREY, np.uint8)) for size in sizes)

    def some():
        shape = tf.image.extract_jpeg_shape(data)
        shape, colours = shape[:2], shape[2]

        def made():
            boxes = [box_of(shape, view) for view in range(len(sizes))]
            return tf.constant(True), *(crop(data, shape, box, sizes[k], mirrored[k]) for k, box in enumerate(boxes))

        small = tf.reduce_prod(tf.cast(shape, tf.int64)) <= decode.MAX_PIXELS
        return tf.cond(small & ((colours == 1) | (colours == 3)), made, none)

    return tf.cond(is_plain(data), some, none)


def is_plain(data):
    """Return whether the bytes string [] surely are a whole, upright JPEG: bool []."""
    length = tf.strings.length(data)
    begin, end = tf.strings.substr(data, 0, 2), tf.strings.substr(data, tf.maximum(length - 2, 0), 2)
    head = tf.strings.substr(data, 0, _HEAD)
    metadata, scan, upright = (tf.strings.regex_full_match(head, p) for p in (_METADATA, _SCAN, _UPRIGHT))
    return (begin == b"\xff\xd8") & (end == b"\xff\xd9") & tf.where(metadata, upright, scan)


def random_box(shape, draws, scale, ratio):
    """Return `augment.random_resized_crop_box` of int32 [2] (height, width) and 22 draws float64: int32 [4]."""
    height, width = (tf.cast(shape[k], tf.float64) for k in (0, 1))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    tries, place = tf.reshape(draws[:20], (10, 2)), draws[20:]
    area = height * width * (scale[0] + (scale[1] - scale[0]) * tries[:, 0])
    aspect = tf.exp(low + (high - low) * tries[:, 1])
    w, h = tf.round(tf.sqrt(area * aspect)), tf.round(tf.sqrt(area / aspect))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = tf.argmax(tf.cast(fits, tf.int32))
    w, h = w[first], h[first]
    drawn = tf.stack([tf.floor(place[0] * (height - h + 1)), tf.floor(place[1] * (width - w + 1)), h, w])

    aspect = tf.clip_by_value(width / height, tf.constant(ratio[0], tf.float64), tf.constant(ratio[1], tf.float64))
    w = tf.minimum(width, tf.maximum(tf.constant(1.0, tf.float64), tf.round(height * aspect)))
    h = tf.minimum(height, tf.maximum(tf.constant(1.0, tf.float64), tf.round(width / aspect)))
    central = tf.stack([tf.math.floordiv(height - h, 2.0), tf.math.floordiv(width - w, 2.0), h, w])
    return tf.cast(tf.where(tf.reduce_any(fits), drawn, central), tf.int32)


def centre_box(shape, size):
    """Return `augment.centre_box` of int32 [2] (height, width): int32 [4]."""
    height, width = shape[0], shape[1]
    least = tf.cast(tf.minimum(height, width), tf.float64)
    side = tf.cast(tf.maximum(tf.round(least * augment.CENTRE_FRACTION), 1.0), tf.int32)
    central = tf.stack([(height - side) // 2, (width - side) // 2, side, side])
    return tf.where((height == size) & (width == size), tf.stack([0, 0, height, width]), central)


def crop(data, shape, box, size, mirrored):
    """Return uint8 [size, size, 3] of a JPEG's box, mirrored or not (bool []); its (height, width) is int32 [2]."""
    corner, extent = box[:2], box[2:]
    before = tf.minimum(corner, _MARGIN)
    whole = tf.minimum(shape - corner, extent + _MARGIN) + before
    decoded = tf.io.decode_and_crop_jpeg(
        data, tf.concat([corner - before, whole], 0), channels=3, dct_method="INTEGER_ACCURATE"
    )
    return resize(tf.slice(decoded, [before[0], before[1], 0], [extent[0], extent[1], 3]), size, mirrored)


def resize(image, size, mirrored):
    """Return an image uint8 [h, w, 3] scaled to uint8 [size, size, 3], bicubic with antialiasing, as Pillow scales it.

    Pillow scales one axis, rounds to 8 bits, and scales the other. Pillow 13 begins with the rows where they shrink more than
    twice as much as the columns; Pillow 11 and 12 never do. Against Pillow 13, one value in ten thousand differs, by one level.

    tensorflow scales an axis fast where many values stand in a row behind it. So the axes are turned round between the
    passes, the colours always in the middle: [x, colour, y].
    """
    shape = tf.shape(image)
    height, width = shape[0], shape[1]
    columns = tf.range(size)
    columns = tf.where(mirrored, size - 1 - columns, columns)
    flat = tf.reshape(image, [height, 3 * width])

    def across(turned, rows):
        """uint8 [3 width, rows] -> uint8 [3 size, rows], whose columns may be mirrored."""
        scaled = _scale_rows(tf.reshape(turned, [width, 3 * rows]), size)
        return tf.reshape(tf.gather(scaled, columns), [3 * size, rows])

    def rows_first():
        return tf.transpose(across(tf.transpose(_scale_rows(flat, size)), size))

    def columns_first():
        return _scale_rows(tf.transpose(across(tf.transpose(flat), height)), size)

    down, across_too = height - size, width - size
    order = (down > 0) & (down > 2 * across_too)
    return tf.reshape(tf.cond(order, rows_first, columns_first), [size, size, 3])


def _scale_rows(array, size):
    """Return uint8 [size, k] of uint8 [n, k]: its rows are scaled, each column for itself."""
    shape = tf.shape(array)
    scale = tf.stack([tf.cast(size, tf.float32) / tf.cast(shape[0], tf.float32), 1.0])
    scaled = tf.raw_ops.ScaleAndTranslate(
        images=tf.reshape(array, [1, shape[0], 1, shape[1]]), size=[size, 1], scale=scale, translation=[0.0, 0.0],
        kernel_type="keyscubic", antialias=True,
    )  # fmt: skip
    # One pass over the memory, where clipping, rounding and casting would each take one.
    rounded = tf.raw_ops.QuantizeV2(
        input=scaled, min_range=0.0, max_range=255.0, T=tf.quint8, mode="SCALED", round_mode="HALF_TO_EVEN"
    )
    return tf.reshape(tf.bitcast(rounded.output, tf.uint8), [size, shape[1]])
