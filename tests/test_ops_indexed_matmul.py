"""The product with chosen matrices: both of its forms, and their gradients, against a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qbheat_jax.ops import indexed_matmul as module


def inputs(batch, others, parts, cells, channels, count, seed=0):
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(batch, others, parts, cells, channels)).astype(np.float32)
    matrices = draw.normal(size=(count, channels + 1, channels)).astype(np.float32)
    toward = draw.normal(size=(*x.shape[:-1], channels + 1)).astype(np.float32)
    return x, matrices, draw.integers(0, count, (batch, parts)).astype(np.int32), toward


def by_loops(x, matrices, choice, toward):
    """(product, gradients of x and matrices), float64."""
    x, matrices, toward = (np.asarray(a, np.float64) for a in (x, matrices, toward))
    y, d_x, d_matrices = np.zeros(toward.shape), np.zeros(x.shape), np.zeros(matrices.shape)
    for b, p in np.ndindex(*choice.shape):
        matrix, at = matrices[choice[b, p]], (b, slice(None), p)
        y[at], d_x[at] = x[at] @ matrix.T, toward[at] @ matrix
        d_matrices[choice[b, p]] += np.einsum("rnd,rnc->dc", toward[at], x[at])
    return y, d_x, d_matrices


@pytest.mark.parametrize("rows", [1, 8, 256])
@pytest.mark.parametrize("batch, parts, count", [(1, 1, 1), (7, 2, 4), (16, 1, 2), (5, 2, 6)])
@pytest.mark.parametrize("alike", [False, True])
def test_both_forms_and_their_gradients_are_the_loop(monkeypatch, rows, batch, parts, count, alike):
    monkeypatch.setattr(module, "_ROWS", rows)
    x, matrices, choice, toward = inputs(batch, 3, parts, 2, 5, count)
    if alike:
        choice = np.full_like(choice, count - 1)

    def differentiated(x, matrices, choice, toward):
        y, pull = jax.vjp(lambda x, m: module.indexed_matmul(x, m, choice), x, matrices)
        return y, *pull(toward)

    def by_selection(x, matrices, choice, toward):
        return module._by_selection(x, matrices, choice), *module._by_selection_vjp(x, matrices, choice, toward)

    expected = by_loops(x, matrices, choice, toward)
    for outputs in (differentiated, by_selection):
        for ours, theirs in zip(jax.jit(outputs)(x, matrices, choice, toward), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=2e-5)


def test_bfloat16_is_multiplied_as_such_and_summed_in_float32():
    x, matrices, choice, toward = inputs(6, 2, 2, 3, 64, 3)
    rounded = [np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32) for a in (x, matrices, toward)]
    expected = by_loops(*rounded[:2], choice, rounded[2])
    x, matrices, choice = jnp.asarray(x, jnp.bfloat16), jnp.asarray(matrices), jnp.asarray(choice)
    y, pull = jax.vjp(lambda x, m: module.indexed_matmul(x, m, choice), x, matrices)
    by_selection = module._by_selection(x, matrices, choice), *module._by_selection_vjp(x, matrices, choice, toward)
    for got in ((y, *pull(jnp.asarray(toward))), by_selection):
        assert got[0].dtype == got[2].dtype == jnp.float32
        for n, (ours, theirs) in enumerate(zip(got, expected)):
            rounding = 2.0**-8 if ours.dtype == jnp.bfloat16 else 1e-5
            np.testing.assert_allclose(ours, theirs, rtol=rounding, atol=1e-4, err_msg=str(n))


def test_cpus_multiply_by_blocks_and_others_by_selection():
    x, matrices, choice, _ = inputs(8, 2, 2, 2, 16, 4)
    traced = jax.jit(module.indexed_matmul).trace(x, matrices, choice)
    assert "while" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "while" not in traced.lower(lowering_platforms=("tpu",)).as_text()


def test_blocks_hold_parts_of_one_choice_and_every_part_once():
    choice = np.random.default_rng(1).integers(0, 5, 37).astype(np.int32)
    slots, position, owner = (np.asarray(a) for a in module._sorted(jnp.asarray(choice), 5, 4))
    assert slots.shape == (37 // 4 + 5, 4)
    assert sorted(slots[slots < 37]) == list(range(37))
    np.testing.assert_array_equal(slots.reshape(-1)[position], np.arange(37))
    for block, k in zip(slots, owner):
        assert set(choice[block[block < 37]]) <= {k}
