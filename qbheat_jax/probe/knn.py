"""Weighted k-nearest-neighbour classification (Wu et al., arXiv 1805.01978): cosine similarity, votes of exp(sim / T).

Candidates are found on the devices, in blocks and in float32. Their distances are then computed again in float64, and a
query for which rounding could have hidden a neighbour is done in float64 throughout. So the neighbours are the exact
ones, whatever the devices and the batch size; of equally near ones those that come first in the training set.
"""

import jax
import jax.numpy as jnp
import numpy as np

from qbheat_jax.probe.features import slices
from qbheat_jax.probe.pmap import pmap, pmap_batches

# Candidates looked at beyond the neighbours asked for.
_MARGIN = 64
# Training examples on a device at once.
_BLOCK = 1 << 16
# Distances that agree to this many decimals are ties: beyond them float64 sums depend on their order.
_DECIMALS = 12


def find(bank, queries, k, batch_size):
    """The k nearest examples of the bank -> (cosine distances float64 [N, k], from near to far; labels int32 [N, k]).

    bank, queries: `Features` of one vector an example, k at most len(bank). batch_size: queries at once.
    """
    similar, index = _candidates(bank, queries, min(k + _MARGIN, len(bank)), batch_size)
    channels = bank.shape[-1]
    distance, chosen = np.empty((len(queries), k)), np.empty((len(queries), k), np.int64)
    for block, x in queries.blocks(max(1, (1 << 24) // (index.shape[1] * channels))):
        near = unit(bank.take(index[block].ravel())).reshape(len(x), -1, channels)
        distance[block], chosen[block] = _nearest(_distance("bc,bmc->bm", unit(x), near), index[block], k)
    # Float32 sums of products err by less than this (Higham 2002, section 3.1: gamma_n |x| |y|, and the rounded inputs).
    error = (channels + 4) * 2.0**-24
    unsure = np.flatnonzero(1.0 - distance[:, -1] <= similar[:, -1] + error)
    if index.shape[1] < len(bank) and len(unsure):
        distance[unsure], chosen[unsure] = _exact(bank, queries.subset(unsure), k)
    return distance, bank.labels[chosen]


def unit(x):
    """float [N, C] -> float64 [N, C] of length 1; a row of zeros stays one."""
    x = np.asarray(x, np.float64)
    length = np.sqrt(np.einsum("nc,nc->n", x, x))[:, None]
    return x / np.where(length > 0, length, 1.0)


def votes(distance, labels, k, temperature, classes):
    """Votes of the k nearest -> float64 [N, classes]; each weighs exp(-distance / T), which is exp(sim / T) / exp(1 / T)."""
    total = np.zeros((len(distance), classes))
    np.add.at(total, (np.arange(len(total))[:, None], labels[:, :k]), np.exp(-distance[:, :k] / temperature))
    return total


def ranks(votes, labels):
    """Place of the true class by votes, 0 the first -> int [N]; ties go to the lower class, one without a vote is last."""
    own = np.take_along_axis(votes, np.asarray(labels)[:, None], 1)
    before = (votes > own) | ((votes == own) & (np.arange(votes.shape[1]) < np.asarray(labels)[:, None]))
    return np.where(own[:, 0] > 0, before.sum(1), votes.shape[1] - 1)


def searcher(count):
    """Return the pmapped search of one block of the bank for the `count` most similar vectors.

    It maps ({"unit": float32 [N, C], "counts": bool [N]}, x float32 [B, C]), vectors of length 1, to (similarities float32
    [B, count] from high to low, rows int32 [B, count]). Rows that do not count come last.
    """

    def nearest(bank, x):
        similar = jnp.matmul(x, bank["unit"].T, precision=jax.lax.Precision.HIGHEST)
        return jax.lax.top_k(jnp.where(bank["counts"], similar, -jnp.inf), count)

    return pmap(nearest)


def _candidates(bank, queries, count, batch_size):
    """(similarities float32 [N, count] from high to low, positions int64 [N, count] in the bank)."""
    size = min(_BLOCK, len(bank))
    mapped, found = searcher(min(count, size)), None
    for block, x in bank.blocks(size):
        filled, counts = next(slices(unit(x).astype(np.float32), size))
        asked = (
            batch for _, q in queries.blocks(batch_size) for batch in slices(unit(q).astype(np.float32), batch_size)
        )
        parts = list(pmap_batches(mapped, {"unit": filled, "counts": counts}, asked))
        similar, index = (np.concatenate(column) for column in zip(*parts))
        index = index.astype(np.int64) + block.start
        if found is not None:
            similar, index = (np.concatenate(pair, 1) for pair in zip(found, (similar, index)))
        order = np.argsort(-similar, 1, kind="stable")[:, :count]
        found = np.take_along_axis(similar, order, 1), np.take_along_axis(index, order, 1)
    return found


def _exact(bank, queries, k):
    """`find` by plain float64 on the host: (distances [N, k], positions int64 [N, k])."""
    distance, chosen = np.empty((len(queries), k)), np.empty((len(queries), k), np.int64)
    for block, x in queries.blocks(256):
        near, index = np.empty((len(x), 0)), np.empty((len(x), 0), np.int64)
        for here, y in bank.blocks():
            positions = np.broadcast_to(np.arange(here.start, here.stop), (len(x), len(y)))
            index = np.concatenate([index, positions], 1)
            near = np.concatenate([near, _distance("bc,mc->bm", unit(x), unit(y))], 1)
            near, index = _nearest(near, index, min(k, near.shape[1]))
        distance[block], chosen[block] = near, index
    return distance, chosen


def _distance(products, x, y):
    """Cosine distance of unit vectors, in [0, 2]."""
    return np.round(np.clip(1.0 - np.einsum(products, x, y, optimize=True), 0.0, 2.0), _DECIMALS)


def _nearest(distance, index, k):
    order = np.lexsort((index, distance), axis=-1)[:, :k]
    return np.take_along_axis(distance, order, 1), np.take_along_axis(index, order, 1)
