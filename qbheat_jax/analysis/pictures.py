"""Render feature maps as uint8 images: principal components, errors, likeness to a cell."""

import dataclasses
import io

import numpy as np

from qbheat_jax.analysis import maps
from qbheat_jax.ops import quarters

# Colour ramps: errors from 0 to twice that of the mean map, and likeness from -1 to 1.
_HEAT = np.array([(22, 20, 40), (120, 28, 92), (226, 88, 34), (252, 240, 190)], np.float64)
_LIKE = np.array([(38, 84, 164), (238, 234, 226), (184, 66, 12)], np.float64)
_CELL = 8  # pixels a cell of a likeness map


@dataclasses.dataclass(frozen=True)
class Colours:
    """The first three principal components of a feature as red, green and blue."""

    mean: np.ndarray
    directions: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @classmethod
    def of(cls, train):
        """Return the Colours of maps [N, h, w, C], which map the inner 96 % of each component to its range."""
        mean, directions, _ = maps.principal(train, 3)
        low, high = np.quantile((train - mean) @ directions, (0.02, 0.98), (0, 1, 2))
        return cls(mean, directions, low, high)

    def __call__(self, z):
        """Return the colours uint8 [..., 3] of features [..., C]; with fewer than three channels the others are grey."""
        values = ((z - self.mean) @ self.directions - self.low) / np.maximum(self.high - self.low, 1e-12)
        colours = (values.clip(0, 1) * 255).round().astype(np.uint8)
        missing = np.full((*colours.shape[:-1], 3 - colours.shape[-1]), 128, np.uint8)
        return np.concatenate([colours, missing], -1)


def error(made, target):
    """Return the squared error of each cell over the mean squared departure from the mean map: [N, h, w, K] -> [N, h, w].

    1 is the average error of the mean map.
    """
    scale = np.square(target, dtype=np.float64).sum(-1).mean()
    return np.square(made - target, dtype=np.float64).sum(-1) / max(scale, 1e-30)


def error_colours(errors):
    """Return errors as colours uint8 [..., 3]: dark is right, orange as wrong as the mean map, pale twice that or more."""
    return _ramp(errors / 2, _HEAT)


def likeness(departure):
    """Return the cosine of each cell to the inner cell of largest norm: [h, w, K] -> ([h, w], (row, column))."""
    size = np.linalg.norm(departure, axis=-1)
    inner = size[1:-1, 1:-1] if min(size.shape) > 2 else size
    row, column = np.unravel_index(inner.argmax(), inner.shape)
    offset = (size.shape[0] - inner.shape[0]) // 2
    row, column = int(row) + offset, int(column) + offset
    unit = departure / np.maximum(size, 1e-30)[..., None]
    return unit @ unit[row, column], (row, column)


def likeness_colours(values, cell):
    """Return likeness [h, w] as uint8 [8 h, 8 w, 3], -1 blue, 0 pale, 1 orange, with `cell` framed."""
    picture = np.repeat(np.repeat(_ramp((values + 1) / 2, _LIKE), _CELL, 0), _CELL, 1)
    return framed(picture, *(slice(_CELL * i, _CELL * (i + 1)) for i in cell), colour=(0, 0, 0))


def framed(picture, rows, columns, colour=(255, 255, 255)):
    """Return a copy of uint8 [H, W, 3] with a frame one pixel wide just within these slices of rows and columns."""
    picture, view = picture.copy(), np.ones((rows.stop - rows.start, columns.stop - columns.start), bool)
    view[1:-1, 1:-1] = False
    picture[rows, columns][view] = colour
    return picture


def visible_framed(images, quarter):
    """Return copies of uint8 [N, H, W, 3] with the placement's visible block framed."""
    where = quarters.visible_slices(*images.shape[1:3], quarter)
    return np.stack([framed(image, *where) for image in images])


def sheet(rows, tile=96, gap=6):
    """Return the PNG bytes of `tiled`."""
    return png(tiled(rows, tile, gap))


def tiled(rows, tile=96, gap=6):
    """Return a PIL image of rows of uint8 [h, w, 3] images, each tile at least `tile` pixels a side."""
    from PIL import Image

    side = max([tile, *(max(p.shape[:2]) for row in rows for p in row)])
    picture = Image.new("RGB", (len(rows[0]) * (side + gap) - gap, len(rows) * (side + gap) - gap), "white")
    for y, row in enumerate(rows):
        for x, array in enumerate(row):
            one = Image.fromarray(array).resize((side, side), Image.Resampling.NEAREST)
            picture.paste(one, (x * (side + gap), y * (side + gap)))
    return picture


def spectra(values, radius, side=480):
    """Return a PIL image of eigenvalues {"x+": complex [C], ...}: A orange, B blue, discs for +, rings for -.

    The circle is |1 + lambda / radius| = 1. Components within it fade over a cell, `radius` cells to half an image.
    """
    from PIL import Image, ImageDraw

    points = {name: np.stack([z.real, -z.imag], -1) for name, z in values.items()}
    reach = 1.1 * max(1.0, *(np.abs(p).max() for p in points.values()))
    picture = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(picture)

    def place(point):
        return tuple(side / 2 * (1 + np.asarray(point) / reach))

    grey, orange, blue = (150, 150, 150), (200, 84, 20), (38, 84, 164)
    draw.line([place((-reach, 0)), place((reach, 0))], grey)
    draw.line([place((0, -reach)), place((0, reach))], grey)
    draw.ellipse([place((-2 * radius, -radius)), place((0, radius))], outline=grey)
    for name, one in points.items():
        colour = orange if name[0] == "x" else blue
        for x, y in map(place, one):
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), colour if name[1] == "+" else None, colour)
    return picture


def png(picture, **options):
    """Return a PIL image as PNG bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True, **options)
    return buffer.getvalue()


def _ramp(values, colours):
    """Return values [...] in [0, 1] as uint8 [..., 3], linear between the colours."""
    places = np.linspace(0, 1, len(colours))
    channels = [np.interp(values, places, colours[:, c]) for c in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)
