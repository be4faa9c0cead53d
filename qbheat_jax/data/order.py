"""The global order of training examples: position -> (epoch, example index), a pure function of the seed.

Positions count 0, 1, 2, ... over the whole run. Global batch k holds positions [k B, (k + 1) B), and each process reads the
rows that its devices hold. The order is independent of the number of processes, so a run can resume with a different
number.
"""

import functools

import numpy as np

from qbheat_jax.data import augment

_ROUNDS = 6
# Up to this many examples, the whole order of an epoch is computed at once (4 bytes an example) and cached.
_KEEP = 1 << 22


def permute(index, n, seed, epoch):
    """Return a bijection of range(n), a different one for each (seed, epoch), at the given places.

    It is a Feistel network over the next power of four, iterated until the result lies in range(n). It needs no memory,
    whatever n is.

    Args:
      index: int64 array of places in the epoch, in range(n).
      n: number of examples.
      seed, epoch: ints.

    Returns:
      int64 array of example indices, of the same shape.
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

    Args:
      n: number of examples in an epoch.
      seed: int.
      shuffle: whether to shuffle each epoch, or keep file order.
      padded: length of an epoch with padding, at least n. Evaluation pads its last batch; training continues with the
        next epoch (None: n).
    """

    def __init__(self, n, seed, *, shuffle, padded=None):
        self.n, self.seed, self.shuffle, self.padded = n, seed, shuffle, padded or n

    def places(self, positions):
        """Map positions int64 [c] to (epoch int64 [c], place in the epoch int64 [c], -1 for padding)."""
        epoch, place = np.divmod(positions, self.padded)
        return epoch, np.where(place < self.n, place, -1)

    def __call__(self, positions):
        """Map positions int64 [c] to (epoch int64 [c], example index int64 [c], -1 for padding)."""
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
    """Split this process's rows of each global batch into chunks of equal size.

    Args:
      start: first position.
      batch_size: global batch size.
      rows: int64 [local], this process's rows of a batch.
      most: largest chunk allowed.

    Attributes:
      chunk: size of every chunk, the largest divisor of `local` that is allowed.
      per_batch: number of chunks per batch.
    """

    def __init__(self, start, batch_size, rows, most):
        self.start, self.batch_size, self.rows = start, batch_size, rows
        self.local = len(rows)
        self.chunk = max(c for c in range(1, min(most, self.local) + 1) if self.local % c == 0)
        self.per_batch = self.local // self.chunk

    def positions(self, j):
        """Return the positions of chunk j, int64 [chunk]."""
        batch, part = divmod(int(j), self.per_batch)
        return self.start + batch * self.batch_size + self.rows[part * self.chunk : (part + 1) * self.chunk]
