"""Which quarter of an image stays visible: drawn statelessly from (seed, epoch, example index)."""

import numpy as np

from qbheat_jax.data import augment


def draw(seed, epoch, index, placements):
    """Placement index 0..8, uniform over the tuple `placements` (see quarters.PLACEMENT_SETS).

    `epoch` and `index` are ints (an int comes back) or integer arrays (int32[...] of their broadcast shape).

    >>> draw(0, 0, 5, (4,))
    4
    """
    table = np.asarray(placements, np.int32)
    chosen = table[augment.bits(seed, epoch, index, "quarter") % len(table)]
    return chosen if isinstance(chosen, np.ndarray) else int(chosen)
