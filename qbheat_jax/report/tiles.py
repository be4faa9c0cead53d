"""Images of the report: reconstructions, baseline fills, their errors on masked pixels, and data URIs."""

import base64
import io

import jax
import numpy as np

from qbheat_jax.ops import images as images_lib
from qbheat_jax.ops import poisson, quarters

# Images up to this side become PNG; larger ones JPEG, scaled down to the second number.
_EXACT, _LARGEST = 96, 256
_CHUNK = 32
_settle = jax.jit(poisson.solve)


def reconstruct(model, images, quarter, blend=True):
    """Return `model.reconstruct` of uint8 [N, H, W, 3] under one placement, in chunks of one size to compile once."""
    return _chunked(images, lambda chunk: model.reconstruct(chunk, np.full(len(chunk), quarter, np.int32), blend=blend))


def whole(model, images):
    """Return `model.reconstruct` of uint8 [N, H, W, 3] that a method decodes whole, in chunks as `reconstruct`."""
    return _chunked(images, model.reconstruct)


def mean_colour(images):
    """Return uint8 [N, H, W, 3], each image in its own mean colour."""
    colours = images.astype(np.float64).mean((1, 2), keepdims=True).round()
    return np.broadcast_to(colours.astype(np.uint8), images.shape)


def psnr(predicted, images):
    """Return the peak signal-to-noise ratio of images uint8 [N, H, W, 3] in dB, float64 [N], at most 100."""
    error = np.square(predicted.astype(np.float64) / 255.0 - images / 255.0).mean((1, 2, 3))
    return -10.0 * np.log10(np.maximum(error, 1e-10))


def settled(images, quarter):
    """Return uint8 [N, H, W, 3] with hidden pixels filled by the heat equation on pixels (`poisson.solve`)."""
    known = ~quarters.masked(*images.shape[1:3])[quarter]
    made = _chunked(images, lambda chunk: _settle(chunk.astype(np.float32), np.broadcast_to(known, chunk.shape[:3])))
    return made.round().clip(0, 255).astype(np.uint8)


def _chunked(images, make):
    """Return make(chunk) of all images, concatenated. The last chunk is padded, so that `make` compiles once."""
    parts = []
    for start in range(0, len(images), _CHUNK):
        chunk = images[start : start + _CHUNK]
        padding = min(_CHUNK, len(images)) - len(chunk)
        padded = np.concatenate([chunk, np.repeat(chunk[-1:], padding, 0)])
        parts.append(np.asarray(make(padded))[: len(chunk)])
    return np.concatenate(parts)


def mean_fill(images, quarter):
    """Return uint8 [N, H, W, 3] with hidden pixels filled by the mean colour of the visible block."""
    height, width = images.shape[1:3]
    colours = visible(images, quarter).reshape(len(images), -1, 3).astype(np.float64).mean(1).round()
    hidden = quarters.masked(height, width)[quarter][None, :, :, None]
    return np.where(hidden, colours[:, None, None, :].astype(np.uint8), images)


def visible(images, quarter):
    """Return the visible block of each image: uint8 [N, H, W, 3] -> uint8 [N, H/2, W/2, 3]."""
    rows, columns = quarters.visible_slices(*images.shape[1:3], quarter)
    return images[:, rows, columns]


def errors(predicted, images, quarter, std=images_lib.STD):
    """Return the mean squared error over masked pixels, float64 [N], in the loss's unit (pixels over channel `std`)."""
    hidden = quarters.masked(*images.shape[1:3])[quarter]
    difference = (predicted.astype(np.float64) - images.astype(np.float64)) / 255.0 / np.asarray(std)
    return np.square(difference[:, hidden]).mean((1, 2))


def box(quarter):
    """Return (left, top) of the visible block in per cent of the image's width and height."""
    row, column = quarters.split(quarter)
    return 25 * column, 25 * row


def data_uri(image, largest=_LARGEST):
    """Return an image uint8 [H, W, 3] as a data URI, scaled down to `largest` pixels a side."""
    from PIL import Image

    picture, buffer = Image.fromarray(image), io.BytesIO()
    if max(image.shape[:2]) <= _EXACT:
        picture.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        picture.thumbnail((largest, largest), Image.Resampling.LANCZOS)
        picture.save(buffer, "JPEG", quality=88)
        kind = "jpeg"
    return uri(buffer.getvalue(), f"image/{kind}")


def uri(data, kind):
    """Return a file's bytes as a data URI of that MIME type."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def triples(images, made):
    """Return rows of `sheet`: (visible block, reconstruction, original) of each image.

    Args:
      images: uint8 [N, H, W, 3].
      made: {placement: their reconstructions}; the placements take turns.
    """
    rows, placements = [], tuple(made)
    for i, image in enumerate(images):
        quarter = placements[i % len(placements)]
        hidden = quarters.masked(*image.shape[:2])[quarter][..., None]
        rows.append((np.where(hidden, np.uint8(232), image), made[quarter][i], image))
    return rows


def sheet(rows, scale=2, gap=4):
    """Return a PIL image of rows of images uint8 [H, W, 3] side by side, two rows to a line."""
    from PIL import Image

    rows = [
        np.concatenate([np.pad(t, ((gap, gap), (gap, gap), (0, 0)), constant_values=255) for t in row], 1)
        for row in rows
    ]
    half = -(-len(rows) // 2)
    rows += [np.full_like(rows[0], 255)] * (2 * half - len(rows))
    columns = [np.concatenate(rows[:half]), np.concatenate(rows[half:])]
    picture = np.concatenate([columns[0], np.full((columns[0].shape[0], 4 * gap, 3), 255, np.uint8), columns[1]], 1)
    return Image.fromarray(picture).resize(
        (picture.shape[1] * scale, picture.shape[0] * scale), Image.Resampling.NEAREST
    )
