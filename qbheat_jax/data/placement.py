"""Draw the visible quarter of each image statelessly from (seed, epoch, example index)."""

import numpy as np

from qbheat_jax.data import augment


def draw(seed, epoch, index, placements):
    """Draw placement indices 0..8 uniformly from the tuple `placements` (see `quarters.PLACEMENT_SETS`).

    Args:
      seed: int.
      epoch, index: ints, or integer arrays that broadcast.
      placements: tuple of placement indices.

    Returns:
      int, or int32 array of the broadcast shape.

    >>> draw(0, 0, 5, (4,))
    4
    """
    table = np.asarray(placements, np.int32)
    chosen = table[augment.bits(seed, epoch, index, "quarter") % len(table)]
    return chosen if isinstance(chosen, np.ndarray) else int(chosen)
