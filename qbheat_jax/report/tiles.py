"""Pixels of the report: the trivial fill, errors on masked pixels, and images as data URIs."""

import base64
import io

import numpy as np

from qbheat_jax import images as images_lib
from qbheat_jax import quarters

# Up to this many pixels a side images are kept exactly (PNG); larger ones as JPEG, scaled down to the second number.
_EXACT, _LARGEST = 96, 256
_CHUNK = 32


def reconstruct(model, images, quarter):
    """`model.reconstruct` of uint8[N, H, W, 3] under one placement, in chunks of one size: one compile -> uint8."""
    parts = []
    for start in range(0, len(images), _CHUNK):
        chunk = images[start : start + _CHUNK]
        padding = min(_CHUNK, len(images)) - len(chunk)
        padded = np.concatenate([chunk, np.repeat(chunk[-1:], padding, 0)])
        made = model.reconstruct(padded, np.full(len(padded), quarter, np.int32))
        parts.append(np.asarray(made)[: len(chunk)])
    return np.concatenate(parts)


def mean_fill(images, quarter):
    """The trivial guess: every masked pixel takes the mean colour of the visible block. uint8[N, H, W, 3] -> uint8."""
    height, width = images.shape[1:3]
    colours = visible(images, quarter).reshape(len(images), -1, 3).astype(np.float64).mean(1).round()
    hidden = quarters.masked(height, width)[quarter][None, :, :, None]
    return np.where(hidden, colours[:, None, None, :].astype(np.uint8), images)


def visible(images, quarter):
    """The visible block of each image: uint8[N, H, W, 3] -> uint8[N, H/2, W/2, 3]."""
    rows, columns = quarters.visible_slices(*images.shape[1:3], quarter)
    return images[:, rows, columns]


def errors(predicted, images, quarter):
    """float64[N]: mean squared error over masked pixels, in the loss's unit (pixels over their standard deviation)."""
    hidden = quarters.masked(*images.shape[1:3])[quarter]
    difference = (predicted.astype(np.float64) - images.astype(np.float64)) / 255.0 / np.asarray(images_lib.STD)
    return np.square(difference[:, hidden]).mean((1, 2))


def box(quarter):
    """Where the visible block lies: (left, top) in per cent of the image's width and height."""
    row, column = quarters.split(quarter)
    return 25 * column, 25 * row


def data_uri(image):
    """uint8[H, W, 3] -> a data URI, for the src of an <img>."""
    from PIL import Image

    picture, buffer = Image.fromarray(image), io.BytesIO()
    if max(image.shape[:2]) <= _EXACT:
        picture.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        picture.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
        picture.save(buffer, "JPEG", quality=88)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
