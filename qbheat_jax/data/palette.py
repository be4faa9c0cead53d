"""Colours of the classes of masks."""

import colorsys

import numpy as np

# Neighbouring numbers take hues that are far apart: the golden ratio's fraction of a turn.
_TURN = 0.6180339887498949
_LIGHTNESS = (0.55, 0.4, 0.7)


def colours(count):
    """Return the colours of values 0 to count - 1, uint8 [count, 3]. Value 0 is dark grey, IGNORED (255) light grey."""
    found = np.empty((count, 3), np.uint8)
    for k in range(count):
        red, green, blue = colorsys.hls_to_rgb(_TURN * k % 1.0, _LIGHTNESS[k % len(_LIGHTNESS)], 0.75)
        found[k] = [round(255 * part) for part in (red, green, blue)]
    found[:1] = 64
    found[255:] = 210
    return found
