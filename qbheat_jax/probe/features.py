"""Features of many images, in memory or memory-mapped, read in batches and standardised on reading."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

# Numbers in a block: 64 MiB of float32.
_BLOCK = 1 << 24


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """N labelled examples: features float32 [N, ...], labels int32 [N]; for segmentation labels [N, ...] of any integer type.

    Attributes:
      parts: arrays [n, ...], in memory or memory-mapped, that act as one concatenated array.
      rows: int64 [N], the rows of that array.
      labels: int32 [N]; for segmentation masks uint8 [N, S, S], or counts uint16 [N, h, w, classes].
      mean, scale: float64 [C] or None; `take` returns (x - mean) * scale.
    """

    parts: tuple
    rows: np.ndarray
    labels: np.ndarray
    mean: np.ndarray | None = None
    scale: np.ndarray | None = None

    @classmethod
    def of(cls, array, labels):
        """Return the Features of all rows of one array [N, ...]."""
        return cls((array,), np.arange(len(array)), as_labels(labels))

    def __len__(self):
        return len(self.rows)

    @property
    def shape(self):
        """The shape of one example's features."""
        return self.parts[0].shape[1:]

    @property
    def in_memory(self):
        """Whether no part is memory-mapped."""
        return not any(isinstance(part, np.memmap) for part in self.parts)

    def subset(self, positions):
        """Return the examples at positions, bool [N] or int [n], in that order."""
        return dataclasses.replace(self, rows=self.rows[positions], labels=self.labels[positions])

    def joined(self, other):
        """Return these examples followed by the other's, with this standardisation."""
        before = sum(map(len, self.parts))
        rows = np.concatenate([self.rows, other.rows + before])
        labels = np.concatenate([self.labels, other.labels])
        return dataclasses.replace(self, parts=self.parts + other.parts, rows=rows, labels=labels)

    def standardised(self, mean, scale):
        """Return the same examples, read as (x - mean) * scale."""
        return dataclasses.replace(self, mean=mean, scale=scale)

    def take(self, positions):
        """Return features float32 [n, ...] of the examples at positions int [n]."""
        rows, taken = self.rows[positions], np.empty((len(positions), *self.shape), np.float32)
        begin = 0
        for part in self.parts:
            here = np.flatnonzero((rows >= begin) & (rows < begin + len(part)))
            taken[here] = part[rows[here] - begin]
            begin += len(part)
        if self.mean is not None:
            for block in blocks(len(taken), self.shape):
                taken[block] = (taken[block] - self.mean) * self.scale
        return taken

    def blocks(self, size=None):
        """Yield (slice of positions, their features), `size` examples or 64 MiB at a time."""
        for block in blocks(len(self), self.shape, size):
            yield block, self.take(np.arange(block.start, block.stop))

    def epoch(self, seed, number, size, steps):
        """Yield one epoch in blocks of k training steps.

        A block is (x float32 [n, ...], labels [n, ...], weights float32 [n], rows int [k, size]). The batch of step j
        is x[rows[j]]. `weights` are 1. Features in memory are one block, moved to the device once; those in files are
        read 64 MiB at a time.

        Args:
          seed, number: ints that determine the order; `number` is the epoch's.
          size: examples of a batch.
          steps: steps of the epoch.
        """
        order = np.random.default_rng((seed, number)).permutation(len(self))[: steps * size].reshape(steps, size)
        if self.in_memory:
            yield *self._resident, order
            return
        count = max(1, _BLOCK // max(1, size * int(np.prod(self.shape))))
        for begin in range(0, steps, count):
            chosen = order[begin : begin + count]
            x, labels = self.take(chosen.ravel()), self.labels[chosen.ravel()]
            yield x, labels, np.ones(len(x), np.float32), np.arange(chosen.size).reshape(chosen.shape)

    @functools.cached_property
    def _resident(self):
        everything = self.take(np.arange(len(self)))
        return jnp.asarray(everything), jnp.asarray(self.labels), jnp.ones(len(self), jnp.float32)


def as_labels(labels):
    """Return labels of images, one number each, as int32 [N]; masks [N, S, S] keep their type."""
    labels = np.asarray(labels)
    return labels.astype(np.int32) if labels.ndim == 1 else labels


def blocks(n, shape, size=None):
    """Return slices of range(n) of `size` examples of this shape, by default 64 MiB of float32."""
    size = size or max(1, _BLOCK // max(1, int(np.prod(shape))))
    return [slice(begin, min(n, begin + size)) for begin in range(0, n, size)]


def slices(array, batch_size):
    """Yield an array [N, ...] as (batch [batch_size, ...], mask bool [batch_size]); zeros fill the last one up."""
    for begin in range(0, len(array), batch_size):
        part = np.asarray(array[begin : begin + batch_size])
        missing = batch_size - len(part)
        mask = np.arange(batch_size) < len(part)
        yield np.concatenate([part, np.zeros((missing, *part.shape[1:]), part.dtype)]), mask


def standard(parts):
    """Return (mean, scale), float64 [C], that standardise arrays [n, ..., C] over all but the last axis, in one pass.

    Parts are merged by the stable update of Chan, Golub and LeVeque (1979). Constant channels get scale 0.
    """
    count, mean, squares = 0, 0.0, 0.0
    for part in parts:
        flat = np.asarray(part, np.float64).reshape(-1, part.shape[-1])
        n, own = len(flat), flat.mean(0)
        shift, total = own - mean, count + n
        squares = squares + ((flat - own) ** 2).sum(0) + shift**2 * (count * n / total)
        mean, count = mean + shift * (n / total), total
    std = np.sqrt(squares / count)
    return mean, np.where(std > 1e-6 * np.abs(mean).max(), 1.0 / np.maximum(std, 1e-30), 0.0)
