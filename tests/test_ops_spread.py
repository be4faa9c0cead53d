"""How far features are spread: known cases, plain numpy, and examples that do not count."""

import jax.numpy as jnp
import numpy as np
import pytest

from qbheat_jax.ops import spread


@pytest.mark.parametrize("count,width", [(40, 6), (6, 40)])
def test_figures_against_numpy(count, width):
    features = np.random.default_rng(0).normal(1.0, np.arange(1, width + 1) / width, (count, width)).astype(np.float32)
    mask = np.arange(count) != 2
    got = spread.figures(jnp.asarray(np.where(mask[:, None], features, 1e6)), jnp.asarray(mask))
    units = features[mask] / np.linalg.norm(features[mask], axis=-1, keepdims=True)
    values = np.linalg.eigvalsh(np.cov(units.T.astype(np.float64)))
    np.testing.assert_allclose(got["feature_std"], units.std(0).mean() * width**0.5, rtol=1e-4)
    np.testing.assert_allclose(got["participation_ratio"], values.sum() ** 2 / (values**2).sum(), rtol=1e-4)


def test_even_features_and_collapsed_ones():
    even = jnp.asarray(np.concatenate([np.eye(8), -np.eye(8)]), jnp.float32)
    everyone = jnp.ones(16, bool)
    assert spread.figures(even, everyone) == {
        "feature_std": pytest.approx(1.0),
        "participation_ratio": pytest.approx(8.0),
    }
    line = jnp.outer(jnp.linspace(-1, 1, 16), jnp.ones(8))
    assert float(spread.figures(line, everyone)["participation_ratio"]) == pytest.approx(1.0)
    alike = spread.figures(jnp.ones((16, 8)), everyone)
    assert float(alike["feature_std"]) < 1e-5 and np.isfinite(float(alike["participation_ratio"]))
