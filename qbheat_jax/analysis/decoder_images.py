"""Images by the decoder: every placement, beyond the frame, and the intermediate steps of the extrapolation."""

import jax.numpy as jnp
import numpy as np

from qbheat_jax.analysis.pictures import png, visible_framed
from qbheat_jax.ops import heat, quarters

# Frames of the animation from step 0 to the whole step, and the milliseconds of the first, inner and last frame.
FRAMES = 12
_FIRST, _BETWEEN, _LAST = 900, 130, 1800


def statistics(target):
    """Return what un-normalises predicted patches: "none" (they are not normalised), "predicted" or "visible" statistics.

    The target's own statistics are never used.
    """
    if not target.norm_pix:
        return "none"
    return "predicted" if target.widths["statistics"] else "visible"


def placements(model, images):
    """Return {placement: reconstructions uint8 [N, H, W, 3], the visible block framed} of each that the grid allows.

    This includes placements not trained on: every set trains all four directions, and A and B hold for any distance.
    """
    anywhere, made = model.anywhere(), {}
    for quarter in anywhere.objective.decoder.placements:
        made[quarter] = visible_framed(np.asarray(anywhere.reconstruct(images, quarter)), quarter)
    return made


def beyond(model, images):
    """Return images twice as large, uint8 [N, 2 H, 2 W, 3], with the given ones as the framed visible quarter.

    The quarter is the centre where that was trained on.
    """
    allowed = model.objective.decoder.placements
    quarter = 4 if 4 in allowed else allowed[0]
    count, height, width, _ = images.shape
    larger = np.zeros((count, 2 * height, 2 * width, 3), np.uint8)
    larger[(slice(None), *quarters.visible_slices(2 * height, 2 * width, quarter))] = images
    return visible_framed(np.asarray(model.reconstruct(larger, quarter)), quarter)


def spreading(model, images, placed, frames=FRAMES):
    """Return reconstructions while the step d grows from 0 to its whole length, uint8 [frames, N, H, W, 3].

    A frame decodes P(d) z. At d = 0 each hidden cell is a copy of its visible source. Propagators that do not shorten
    (`Heat.shortens`) have no such frames.

    Args:
      images: uint8 [N, H, W, 3].
      placed: int [N], the placement of each.
    """
    decoder, variables = model.variables["params"]["decoder"], model.variables
    choice, shown = model.objective.decoder.heat, []
    for share in np.linspace(0, 1, frames):
        shortened = heat.shortened(decoder["heat"], choice, jnp.float32(share))
        changed = {**variables, "params": {**variables["params"], "decoder": {**decoder, "heat": shortened}}}
        shown.append(np.asarray(model.reconstruct(images, placed, variables=changed)))
    return np.stack(shown)


def animated(shown, gap=4, scale=2):
    """Return (animated PNG, PNG of its last frame) as bytes, from frames uint8 [frames, N, H, W, 3] side by side."""
    from PIL import Image

    frames = []
    for images in shown:
        # Transparent gaps suit light and dark pages.
        opaque = np.concatenate([images, np.full_like(images[..., :1], 255)], -1)
        padded = np.pad(opaque, ((0, 0), (0, 0), (0, gap), (0, 0)))
        row = Image.fromarray(np.concatenate(list(padded), 1)[:, :-gap])
        frames.append(row.resize((row.width * scale, row.height * scale), Image.Resampling.NEAREST))
    durations = [_FIRST, *[_BETWEEN] * (len(frames) - 2), _LAST]
    moving = png(frames[0], save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return moving, png(frames[-1])
