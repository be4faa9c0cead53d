"""The one global order of training examples: position -> (epoch, example index), a pure function of the seed.

Positions count 0, 1, 2, ... over the whole run. Global batch k holds positions [k B, (k + 1) B), and each process takes
the rows of it that its devices hold. Nothing depends on the number of processes, so a run resumes on any number of them
where it stopped.
"""

import functools

import numpy as np

from qbheat_jax.data import augment

_ROUNDS = 6
# Up to here an epoch's whole order is worked out at once (4 bytes an example) and kept for two epochs.
_KEEP = 1 << 22


def permute(index, n, seed, epoch):
    """Place in the epoch -> example index: a bijection of range(n), another one for each (seed, epoch).

    `index`: int64[...] in range(n). Returns int64 of the same shape. A Feistel network over the next power of
    four, walked until it lands inside range(n): no memory, whatever n is.
    """
    index = np.atleast_1d(np.asarray(index)).astype(np.uint64)
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    keys = [augment.bits(seed, epoch, round_, "order") for round_ in range(_ROUNDS)]

    def encrypt(x):
        left, right = x >> half, x & low
        for key in keys:
            left, right = right, left ^ (augment.mix(right ^ key) & low)
        return (left << half) | right

    index = encrypt(index)
    while (outside := index >= n).any():
        index[outside] = encrypt(index[outside])
    return index.astype(np.int64)


@functools.lru_cache(maxsize=4)
def _whole(n, seed, epoch):
    return permute(np.arange(n), n, seed, epoch).astype(np.int32)


class Order:
    """Position -> (epoch, example index) for one split.

    `n` examples an epoch; `shuffle` or file order; `padded` >= n is the length of an epoch with its padding
    (evaluation fills its last batch; training runs on into the next epoch, padded = n).
    """

    def __init__(self, n, seed, *, shuffle, padded=None):
        self.n, self.seed, self.shuffle, self.padded = n, seed, shuffle, padded or n

    def places(self, positions):
        """int64[c] positions -> (epoch int64[c], place in the epoch int64[c], -1 where it is padding)."""
        epoch, place = np.divmod(positions, self.padded)
        return epoch, np.where(place < self.n, place, -1)

    def __call__(self, positions):
        """int64[c] positions -> (epoch int64[c], example index int64[c], -1 where it is padding)."""
        epoch, place = self.places(positions)
        if not self.shuffle:
            return epoch, place
        index = np.empty_like(place)
        for e in np.unique(epoch):
            here = epoch == e
            if self.n <= _KEEP:
                index[here] = _whole(self.n, self.seed, int(e))[place[here]]
            else:
                index[here] = permute(place[here], self.n, self.seed, int(e))
        return epoch, index


class Slices:
    """Cuts this process's `rows` (int64[local]) of each global batch into chunks of at most `most` positions.

    Chunk j of this process, `per_batch` chunks a batch, all of the same size `chunk`.
    """

    def __init__(self, start, batch_size, rows, most):
        self.start, self.batch_size, self.rows = start, batch_size, rows
        self.local = len(rows)
        self.chunk = max(c for c in range(1, min(most, self.local) + 1) if self.local % c == 0)
        self.per_batch = self.local // self.chunk

    def positions(self, j):
        """int64[chunk]: the positions of chunk j."""
        batch, part = divmod(int(j), self.per_batch)
        return self.start + batch * self.batch_size + self.rows[part * self.chunk : (part + 1) * self.chunk]
