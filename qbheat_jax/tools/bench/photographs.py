"""Write JPEGs of about 500 x 375 pixels, as in large data sets, from installed photographs."""

import pathlib

import numpy as np
from PIL import Image

from qbheat_jax.data import augment
from qbheat_jax.data.sources import photos
from qbheat_jax.errors import UserError

HEIGHT, WIDTH, QUALITY = 375, 500, 90
_SEED = 0


def write(folder, count):
    """Write `count` JPEGs into a folder; return a description of what they show."""
    folder = pathlib.Path(folder)
    try:
        pictures, words = [photos.load(row[0]) for row in photos.PHOTOGRAPHS], "parts of photographs"
    except UserError:
        pictures, words = (
            None,
            "smooth noise, since the photographs are not installed (pip install 'qbheat_jax[photos]')",
        )
    for index in range(count):
        generator = augment.rng(_SEED, 0, index, "photos")
        # Sizes vary a little, as in such data sets.
        height, width = HEIGHT + int(generator.integers(-20, 21)), WIDTH + int(generator.integers(-20, 21))
        image = _noise(generator) if pictures is None else _part(generator, pictures[index % len(pictures)])
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
        resized.save(folder / f"{index:05d}.jpg", quality=QUALITY)
    return words


def _part(generator, picture):
    """Return a random part of a photograph uint8 [H, W, 3]."""
    top, left, height, width = augment.random_resized_crop_box(generator, *picture.shape[:2], (0.5, 1.0), (1.2, 1.5))
    return np.ascontiguousarray(picture[top : top + height, left : left + width])


def _noise(generator):
    return generator.integers(0, 256, (HEIGHT // 15, WIDTH // 15, 3), np.uint8)
