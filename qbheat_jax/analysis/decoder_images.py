"""What the decoder makes of it: every placement, beyond the picture, and the visible quarter as it spreads step by step."""

import jax.numpy as jnp
import numpy as np

from qbheat_jax.analysis.pictures import png, visible_framed
from qbheat_jax.ops import heat, quarters

# Frames of the animation between the step 0 and the whole step, and how long each is shown, in ms.
FRAMES = 12
_FIRST, _BETWEEN, _LAST = 900, 130, 1800


def statistics(target):
    """With what predicted patches are un-normalised, in a word: "none" (they are not normalised), "predicted", "visible".

    Never with the target's own: those are not known where there is something to predict.
    """
    if not target.norm_pix:
        return "none"
    return "predicted" if target.widths["statistics"] else "visible"


def placements(model, images):
    """{placement: the images reconstructed, the visible block framed}: uint8 [N, H, W, 3] of each that the map's cells allow.

    Those not trained on too: every set of placements trains all four directions, and their maps know any distance.
    """
    anywhere, made = model.anywhere(), {}
    for quarter in anywhere.objective.decoder.placements:
        made[quarter] = visible_framed(np.asarray(anywhere.reconstruct(images, quarter)), quarter)
    return made


def beyond(model, images):
    """Whole images taken for the visible quarter of ones twice as large -> uint8 [N, 2 H, 2 W, 3], the known part framed.

    In the centre, where that was trained on.
    """
    allowed = model.objective.decoder.placements
    quarter = 4 if 4 in allowed else allowed[0]
    count, height, width, _ = images.shape
    larger = np.zeros((count, 2 * height, 2 * width, 3), np.uint8)
    larger[(slice(None), *quarters.visible_slices(2 * height, 2 * width, quarter))] = images
    return visible_framed(np.asarray(model.reconstruct(larger, quarter)), quarter)


def spreading(model, images, placed, frames=FRAMES):
    """Reconstructions while the step d grows from 0 to its whole length -> uint8 [frames, N, H, W, 3].

    images uint8 [N, H, W, 3], placed int [N]: the placement of each. At d = 0 every hidden cell is a copy of the visible one
    that it comes from; a frame is what the decoder makes of P(d) z. Not of `power`, which takes whole cells.
    """
    decoder, variables = model.variables["params"]["decoder"], model.variables
    choice, shown = model.objective.decoder.heat, []
    for share in np.linspace(0, 1, frames):
        shortened = heat.shortened(decoder["heat"], choice, jnp.float32(share))
        changed = {**variables, "params": {**variables["params"], "decoder": {**decoder, "heat": shortened}}}
        shown.append(np.asarray(model.reconstruct(images, placed, variables=changed)))
    return np.stack(shown)


def animated(shown, gap=4, scale=2):
    """Frames uint8 [frames, N, H, W, 3], the images beside one another -> the bytes of (an animated PNG, its last frame)."""
    from PIL import Image

    frames = []
    for images in shown:
        # Transparent between the images, as the page below may be light or dark.
        opaque = np.concatenate([images, np.full_like(images[..., :1], 255)], -1)
        padded = np.pad(opaque, ((0, 0), (0, 0), (0, gap), (0, 0)))
        row = Image.fromarray(np.concatenate(list(padded), 1)[:, :-gap])
        frames.append(row.resize((row.width * scale, row.height * scale), Image.Resampling.NEAREST))
    durations = [_FIRST, *[_BETWEEN] * (len(frames) - 2), _LAST]
    moving = png(frames[0], save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return moving, png(frames[-1])
