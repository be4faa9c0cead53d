"""Feature maps as pictures, arrays of uint8: principal components as colours, errors, likeness to a chosen cell."""

import dataclasses
import io

import numpy as np

from qbheat_jax.analysis import maps
from qbheat_jax.ops import quarters

# Colours from 0 to 1 (an error from none to twice that of the mean map) and from -1 to 1 (likeness).
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
        """From maps [N, h, w, C]: all but the outer 4 % of each component's values are spread over its range."""
        mean, directions, _ = maps.principal(train, 3)
        low, high = np.quantile((train - mean) @ directions, (0.02, 0.98), (0, 1, 2))
        return cls(mean, directions, low, high)

    def __call__(self, z):
        """[..., C] -> uint8 [..., 3]. A map of fewer than three channels leaves the others grey."""
        values = ((z - self.mean) @ self.directions - self.low) / np.maximum(self.high - self.low, 1e-12)
        colours = (values.clip(0, 1) * 255).round().astype(np.uint8)
        missing = np.full((*colours.shape[:-1], 3 - colours.shape[-1]), 128, np.uint8)
        return np.concatenate([colours, missing], -1)


def error(made, target):
    """Squared error of each cell, as a share of what departs from the mean map on average: [N, h, w, K] -> [N, h, w].

    1: as wrong as the mean map is on average.
    """
    scale = np.square(target, dtype=np.float64).sum(-1).mean()
    return np.square(made - target, dtype=np.float64).sum(-1) / max(scale, 1e-30)


def error_colours(errors):
    """[...] -> uint8 [..., 3]: dark is right, orange about as wrong as the mean map, pale twice that or worse."""
    return _ramp(errors / 2, _HEAT)


def likeness(departure):
    """Cosine of every cell to the one that departs most, of those not at the border: [h, w, K] -> ([h, w], (row, column))."""
    size = np.linalg.norm(departure, axis=-1)
    inner = size[1:-1, 1:-1] if min(size.shape) > 2 else size
    row, column = np.unravel_index(inner.argmax(), inner.shape)
    offset = (size.shape[0] - inner.shape[0]) // 2
    row, column = int(row) + offset, int(column) + offset
    unit = departure / np.maximum(size, 1e-30)[..., None]
    return unit @ unit[row, column], (row, column)


def likeness_colours(values, cell):
    """[h, w] from -1 (blue) over 0 (pale) to 1 (orange) -> uint8 [8 h, 8 w, 3], the chosen cell framed."""
    picture = np.repeat(np.repeat(_ramp((values + 1) / 2, _LIKE), _CELL, 0), _CELL, 1)
    return framed(picture, *(slice(_CELL * i, _CELL * (i + 1)) for i in cell), colour=(0, 0, 0))


def framed(picture, rows, columns, colour=(255, 255, 255)):
    """A copy of uint8 [H, W, 3] with a frame one pixel wide, just within these rows and columns (slices)."""
    picture, view = picture.copy(), np.ones((rows.stop - rows.start, columns.stop - columns.start), bool)
    view[1:-1, 1:-1] = False
    picture[rows, columns][view] = colour
    return picture


def visible_framed(images, quarter):
    """Copies of uint8 [N, H, W, 3] with the block framed that this placement sees."""
    where = quarters.visible_slices(*images.shape[1:3], quarter)
    return np.stack([framed(image, *where) for image in images])


def sheet(rows, tile=96, gap=6):
    """Pictures as of `tiled` -> the bytes of a PNG."""
    return png(tiled(rows, tile, gap))


def tiled(rows, tile=96, gap=6):
    """Pictures uint8 [h, w, 3] of any size, rows of equally many -> PIL image, each tile `tile` pixels a side or more."""
    from PIL import Image

    side = max([tile, *(max(p.shape[:2]) for row in rows for p in row)])
    picture = Image.new("RGB", (len(rows[0]) * (side + gap) - gap, len(rows) * (side + gap) - gap), "white")
    for y, row in enumerate(rows):
        for x, array in enumerate(row):
            one = Image.fromarray(array).resize((side, side), Image.Resampling.NEAREST)
            picture.paste(one, (x * (side + gap), y * (side + gap)))
    return picture


def spectra(values, radius, side=480):
    """Eigenvalues in the complex plane, {"x+": complex[C], ...} -> PIL image: A in orange, B in blue, discs for +, rings for -.

    The circle is |1 + lambda / radius| = 1: what lies within it fades over a cell, `radius` cells to half an image.
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
    """The bytes of a PIL image as PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True, **options)
    return buffer.getvalue()


def _ramp(values, colours):
    """[...] from 0 to 1 -> uint8 [..., 3], linear between the colours."""
    places = np.linspace(0, 1, len(colours))
    channels = [np.interp(values, places, colours[:, c]) for c in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)
