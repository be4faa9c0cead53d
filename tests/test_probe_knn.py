"""k-NN: the neighbours and votes of scikit-learn, ties included, for any block, batch and number of devices."""

import jax
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from qbheat_jax.probe import knn
from qbheat_jax.probe.features import Features

CLASSES = 5


def random_case(bank=180, queries=50, channels=12, seed=0):
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(CLASSES, channels))
    made = []
    for n in (bank, queries):
        labels = generator.integers(0, CLASSES, n)
        made.append((centres[labels] + 1.5 * generator.normal(size=(n, channels))).astype(np.float32))
        made.append(labels)
    return made


def tied_case():
    """Vectors of zeros and four ones: similarities are exact multiples of 1/4, so that nearly everything is a tie."""
    generator = np.random.default_rng(1)
    x = np.zeros((240, 8), np.float32)
    for row in x:
        row[generator.permutation(8)[:4]] = 1.0
    y = generator.integers(0, CLASSES, 240)
    return x[:200], y[:200], x[200:], y[200:]


def reference(x, y, queries, k, temperature, index_decides=False):
    """scikit-learn's answer. `index_decides`: of equally near examples it takes the first, which it is given distances for."""
    if not index_decides:
        sklearn = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp(-distance / temperature)
        )
        return sklearn.fit(x.astype(np.float64), y).predict(queries.astype(np.float64))
    far = 1.0 - knn.unit(queries).astype(np.float64) @ knn.unit(x).T
    far = np.round(far, 9) + 1e-12 * np.arange(len(x))
    sklearn = KNeighborsClassifier(
        k, metric="precomputed", weights=lambda distance: np.exp(-np.round(distance, 9) / temperature)
    )
    return sklearn.fit(np.zeros((len(x), len(x))), y).predict(far)


def ours(x, y, queries, k, temperature, batch_size=16):
    found = knn.find(Features.of(x, y), Features.of(queries, np.zeros(len(queries))), k, batch_size)
    return knn.votes(*found, k, temperature, CLASSES).argmax(1)


@pytest.mark.parametrize("temperature", [0.02, 0.2])
@pytest.mark.parametrize("k", [1, 5, 60, 180])
def test_the_answers_are_those_of_scikit_learn(k, temperature):
    x, y, queries, _ = random_case()
    np.testing.assert_array_equal(ours(x, y, queries, k, temperature), reference(x, y, queries, k, temperature))


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 7])
def test_ties_are_those_of_scikit_learn(k):
    """Two classes with the same votes: the lower one. Neighbours at the same distance: those that come first."""
    x, y, queries, _ = tied_case()
    distance, labels = knn.find(Features.of(x, y), Features.of(queries, np.zeros(len(queries))), k, 16)
    total = np.sort(knn.votes(distance, labels, k, 0.5, CLASSES), 1)
    assert k in (1,) or (total[:, -1] == total[:, -2]).any(), "the case has ties of votes"
    np.testing.assert_array_equal(ours(x, y, queries, k, 0.5), reference(x, y, queries, k, 0.5, index_decides=True))


@pytest.mark.parametrize("case", [random_case, tied_case])
def test_any_batch_block_and_number_of_devices_gives_the_same(case, monkeypatch):
    x, y, queries, _ = case()
    bank, asked = Features.of(x, y), Features.of(queries, np.zeros(len(queries)))
    expected = knn.find(bank, asked, 9, 16)
    everything = jax.local_devices()
    for count, batch_size, block in ((1, 7, 1 << 16), (4, 64, 64), (8, 1, 11)):
        monkeypatch.setattr(jax, "local_devices", lambda count=count: everything[:count])
        monkeypatch.setattr(knn, "_BLOCK", block)
        got = knn.find(bank, asked, 9, batch_size)
        np.testing.assert_allclose(got[0], expected[0], atol=1e-6)  # float32 sums depend on the shape of the product
        np.testing.assert_array_equal(got[1], expected[1])


def test_the_rank_of_the_true_class():
    votes = np.array([[0.0, 2.0, 1.0], [1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [3.0, 0.0, 0.0]])
    np.testing.assert_array_equal(knn.ranks(votes, [2, 0, 1, 1]), [1, 0, 1, 2])
    np.testing.assert_allclose(knn.unit(np.array([[0.0, 0.0], [3.0, 4.0]])), [[0, 0], [0.6, 0.8]], rtol=1e-6)
