"""Classifiers against their definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qbheat_jax.models.heads import PooledHead


@pytest.fixture
def outputs():
    """What an encoder with a class token returns."""
    random = np.random.default_rng(0)
    features = random.normal(size=(2, 3, 4, 6)).astype(np.float32)
    return features, {"class_token": random.normal(size=(2, 6)).astype(np.float32), "stem": np.zeros((2, 6, 8, 3))}


def test_pooled_head_reads_the_class_token_or_the_mean_of_the_cells(outputs):
    features, out = outputs
    head = PooledHead(5)
    variables = head.init(jax.random.key(0), features, out)
    p = variables["params"]["classifier"]
    assert set(variables) == {"params"} and p["kernel"].shape == (6, 5)
    np.testing.assert_allclose(
        head.apply(variables, features, out), out["class_token"] @ p["kernel"], rtol=1e-5, atol=1e-6
    )
    logits = head.apply(variables, features, {"stem": out["stem"]})
    np.testing.assert_allclose(logits, features.mean((1, 2)) @ p["kernel"], rtol=1e-5, atol=1e-6)


def test_pooled_head_computes_in_float32(outputs):
    features = jnp.asarray(outputs[0], jnp.bfloat16)
    head = PooledHead(5)
    variables = head.init(jax.random.key(0), features, {})
    logits = head.apply(variables, features, {})
    assert logits.dtype == jnp.float32
    np.testing.assert_array_equal(logits, head.apply(variables, features.astype(jnp.float32), {}))


def test_dropout_is_of_training_alone(outputs):
    features, out = outputs
    head = PooledHead(5, dropout=0.5)
    variables = head.init(jax.random.key(0), features, out)
    trained = head.apply(variables, features, out, True, rngs={"dropout": jax.random.key(1)})
    assert not np.allclose(trained, head.apply(variables, features, out))
