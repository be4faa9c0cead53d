"""Colours of the classes of masks, and masks as index PNGs."""

import colorsys
import io

import numpy as np
from PIL import Image

# Neighbouring numbers take hues that are far apart: the golden ratio's fraction of a turn.
_TURN = 0.6180339887498949
_LIGHTNESS = (0.55, 0.4, 0.7)


def colours():
    """Return the colours of values 0 to 255, uint8 [256, 3]. Value 0 is dark grey, IGNORED (255) light grey."""
    found = np.empty((256, 3), np.uint8)
    for k in range(256):
        red, green, blue = colorsys.hls_to_rgb(_TURN * k % 1.0, _LIGHTNESS[k % len(_LIGHTNESS)], 0.75)
        found[k] = [round(255 * part) for part in (red, green, blue)]
    found[0], found[255] = 64, 210
    return found


def png(mask):
    """Return a mask uint8 [H, W] as the bytes of an index PNG in these colours."""
    picture, buffer = Image.fromarray(mask), io.BytesIO()
    picture.putpalette(colours().tobytes())
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
