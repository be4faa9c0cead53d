"""Weighted k-nearest-neighbour classification (Wu et al., arXiv 1805.01978): cosine similarity, votes of exp(sim / T).

Similarities are computed in float32 on the devices, one block of the training set after the other. Equally similar
neighbours rank by their position in the training set.
"""

import jax
import jax.numpy as jnp
import numpy as np

from qbheat_jax.probe.features import slices
from qbheat_jax.probe.pmap import pmap, pmap_batches

# Training examples on a device at once.
_BLOCK = 1 << 16


def find(bank, queries, k, batch_size):
    """Return the k nearest examples of the bank to each query, from near to far.

    Args:
      bank: `Features` of M vectors.
      queries: `Features` of N vectors.
      k: neighbours, at most M.
      batch_size: queries at once.

    Returns:
      (cosine distances float32 [N, k], labels int32 [N, k]).
    """
    size = min(_BLOCK, len(bank))
    search, found = searcher(min(k, size)), None
    for block, x in bank.blocks(size):
        filled, counts = next(slices(unit(x), size))
        asked = (batch for _, q in queries.blocks(batch_size) for batch in slices(unit(q), batch_size))
        parts = list(pmap_batches(search, {"unit": filled, "counts": counts}, asked))
        similar, index = (np.concatenate(column) for column in zip(*parts))
        index = index.astype(np.int64) + block.start
        if found is not None:
            similar, index = (np.concatenate(pair, 1) for pair in zip(found, (similar, index)))
        order = np.argsort(-similar, 1, kind="stable")[:, :k]
        found = np.take_along_axis(similar, order, 1), np.take_along_axis(index, order, 1)
    similar, index = found
    return np.clip(1.0 - similar, 0.0, 2.0), bank.labels[index]


def unit(x):
    """Return the rows of x, float [N, C], at length 1 -> float32 [N, C]. A row of zeros stays zero."""
    x = np.asarray(x, np.float64)
    length = np.sqrt(np.einsum("nc,nc->n", x, x))[:, None]
    return (x / np.where(length > 0, length, 1.0)).astype(np.float32)


def votes(distance, labels, k, temperature, classes):
    """Return the votes of the k nearest, float64 [N, classes]. Each weighs exp(-distance / T) = exp(sim / T) / exp(1 / T)."""
    total = np.zeros((len(distance), classes))
    np.add.at(total, (np.arange(len(total))[:, None], labels[:, :k]), np.exp(-distance[:, :k] / temperature))
    return total


def ranks(votes, labels):
    """Return the rank of the true class by votes, int [N], from 0. Ties go to the lower class; without votes it is last."""
    own = np.take_along_axis(votes, np.asarray(labels)[:, None], 1)
    before = (votes > own) | ((votes == own) & (np.arange(votes.shape[1]) < np.asarray(labels)[:, None]))
    return np.where(own[:, 0] > 0, before.sum(1), votes.shape[1] - 1)


def searcher(count):
    """Return the pmapped search of one block of the bank for the `count` most similar vectors.

    It maps ({"unit": float32 [N, C], "counts": bool [N]}, x float32 [B, C]), vectors of length 1, to (similarities float32
    [B, count] from high to low, rows int32 [B, count]). Rows where `counts` is False come last.
    """

    def nearest(bank, x):
        similar = jnp.matmul(x, bank["unit"].T, precision=jax.lax.Precision.HIGHEST)
        return jax.lax.top_k(jnp.where(bank["counts"], similar, -jnp.inf), count)

    return pmap(nearest)
