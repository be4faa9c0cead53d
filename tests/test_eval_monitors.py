"""Label-free monitors against closed forms: features whose spectrum is known."""

import numpy as np
import pytest

from qbheat_jax.eval import monitors


def basis(n, k, seed=0):
    """Orthonormal columns [n, k], orthogonal to the vector of ones."""
    drawn = np.random.default_rng(seed).normal(size=(n, k + 1))
    drawn[:, 0] = 1.0
    return np.linalg.qr(drawn)[0][:, 1:]


def test_rankme_is_the_exponential_of_the_entropy():
    values = np.array([4.0, 2.0, 1.0, 1.0])
    share = values / 8
    features = basis(50, 4) * values @ basis(9, 4, 1).T
    assert monitors.rankme(features) == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    # Of any scale, and without centring.
    assert monitors.rankme(1e-3 * features) == pytest.approx(monitors.rankme(features))
    assert monitors.rankme(np.ones((20, 6))) == pytest.approx(1.0)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_alpha_req_finds_the_exponent(alpha):
    values = np.arange(1, 41) ** (-alpha / 2)
    values[:2] *= 7  # are not fitted
    features = 5.0 + basis(300, 40) * values @ basis(50, 40, 1).T
    assert monitors.alpha_req(features) == pytest.approx(alpha)


def test_lidar_counts_the_directions_between_images():
    """Means that differ equally in k directions, and views that differ equally in all: k."""
    images, views, width = 60, 6, 8
    within = np.random.default_rng(0).normal(size=(images, views, width))
    within -= within.mean(1, keepdims=True)
    factor = np.linalg.cholesky(np.einsum("nvc,nvd->cd", within, within) / (images * views))
    within = within @ np.linalg.inv(factor).T
    for k in (1, 3, 8):
        means = basis(images, k) @ np.eye(k, width)
        assert monitors.lidar(means[:, None] + within) == pytest.approx(k)
        # Another basis changes nothing, up to the regularisation.
        turned = np.random.default_rng(1).normal(size=(width, width))
        assert monitors.lidar((means[:, None] + within) @ turned) == pytest.approx(k, rel=0.05)


def test_lidar_weighs_by_what_varies_within_images():
    """Two directions between images of which one also varies between views: the eigenvalues are 1 / (s + delta)."""
    images, spread = 40, 3.0
    means = basis(images, 2) * np.sqrt(images)
    within = np.zeros((2, 2, 2))
    within[0, :, 0], within[1, :, 1] = (-1, 1), (-spread, spread)
    views = means[:, None] + np.tile(within, (images // 2, 1, 1))
    variances = np.array([0.5, spread**2 / 2])
    values = 1 / (variances + 1e-4 * variances.mean())
    share = values / values.sum()
    assert monitors.lidar(views) == pytest.approx(np.exp(-(share * np.log(share)).sum()))


def test_what_has_no_monitor_has_none():
    broken = np.full((8, 3), np.nan)
    assert monitors.rankme(broken) is monitors.alpha_req(broken) is monitors.lidar(broken[:, None].repeat(2, 1)) is None
    assert monitors.rankme(np.zeros((8, 3))) == 0.0
    assert monitors.alpha_req(np.ones((8, 3))) is None and monitors.alpha_req(np.eye(8)[:, :3]) is None
    assert monitors.lidar(np.ones((8, 4, 3))) is None and monitors.lidar(np.ones((8, 1, 3))) is None


def test_spearman():
    assert monitors.spearman([3, 1, 2], [30, 10, 20]) == 1.0 and monitors.spearman([3, 1, 2], [1, 3, 2]) == -1.0
    x, y = [1, 2, 2, 4], [1, 3, 2, 2]  # ranks 0, 1.5, 1.5, 3 and 0, 3, 1.5, 1.5
    assert monitors.spearman(x, y) == pytest.approx(np.corrcoef([0, 1.5, 1.5, 3], [0, 3, 1.5, 1.5])[0, 1])
    assert monitors.spearman([1, 1, 1], [1, 2, 3]) is None
