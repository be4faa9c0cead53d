"""Heat conduction: the exact properties of the solution, on maps that are not square."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qbheat_jax.ops.heat_conduction import dct_matrix, decay, heat_conduction, rates

RANDOM = np.random.default_rng(0)
SHAPE = (2, 6, 5, 3)
U = RANDOM.normal(size=SHAPE).astype(np.float32)
K = RANDOM.uniform(0, 2, SHAPE[1:]).astype(np.float32)


@jax.jit
def conduct(u, k):
    return heat_conduction(u, decay(k))


def close(a, b, error=1e-6):
    np.testing.assert_allclose(a, b, rtol=0, atol=error)


def test_a_known_map():
    i, j = np.mgrid[:3, :4]
    known = [
        [0.7794, 2.2882, 2.9974, 1.5555],
        [1.3819, 1.3896, 1.9194, 2.8283],
        [2.0469, 1.4085, 0.9970, 2.4079],
    ]
    u, k = (3 * i + 2 * j) % 5, 0.25 * ((i + j) % 3)
    close(conduct(u[None, :, :, None].astype(np.float32), k[..., None].astype(np.float32))[0, ..., 0], known, 6e-5)


@pytest.mark.parametrize("n", [1, 2, 7, 56])
def test_the_cosines_are_orthonormal_and_diagonalise_the_insulated_laplacian(n):
    d = dct_matrix(n).astype(np.float64)
    close(d @ d.T, np.eye(n))
    laplacian = np.diag(np.full(n, -2.0)) + np.eye(n, k=1) + np.eye(n, k=-1)
    laplacian[0, 0] += 1
    laplacian[-1, -1] += 1
    close(d @ laplacian @ d.T, np.diag(2 * np.cos(np.pi * np.arange(n) / n) - 2), 2e-6)


def test_rates_are_the_continuums():
    close(rates(2, 3)[1, 2], (np.pi / 2) ** 2 + (2 * np.pi / 3) ** 2, 1e-5)


def test_no_time_changes_nothing_and_much_leaves_the_mean():
    close(conduct(U, np.zeros_like(K)), U)
    close(conduct(U, np.full_like(K, 1e3)), np.broadcast_to(U.mean((1, 2), keepdims=True), SHAPE))


def test_the_mean_is_kept_and_the_map_contracts():
    y = conduct(U, K)
    close(y.mean((1, 2)), U.mean((1, 2)))
    assert (np.square(y).sum((1, 2)) < np.square(U).sum((1, 2))).all()


def test_times_add_and_the_map_is_linear():
    close(conduct(conduct(U, K), K), conduct(U, 2 * K))
    close(conduct(U[:1] - 3 * U[1:], K), conduct(U, K)[:1] - 3 * conduct(U, K)[1:], 3e-6)


@pytest.mark.parametrize("axis", [1, 2])
def test_flips_commute(axis):
    close(conduct(np.flip(U, axis), K), np.flip(conduct(U, K), axis))


def test_one_diffusivity_for_all_channels_or_one_for_each_example():
    close(conduct(U, K[..., :1]), conduct(U, np.repeat(K[..., :1], 3, -1)))
    each = conduct(U, np.stack([K, 2 * K]))
    close(each, jnp.concatenate([conduct(U[:1], K), conduct(U[1:], 2 * K)]))
    close(conduct(U[:, None], np.stack([K, 2 * K])[:, None])[:, 0], each)


def test_bfloat16_maps_keep_their_type_and_float32_factors():
    factors = decay(jnp.asarray(K, jnp.bfloat16))
    y = heat_conduction(jnp.asarray(U, jnp.bfloat16), factors)
    assert factors.dtype == jnp.float32 and y.dtype == jnp.bfloat16
    close(np.float32(y), heat_conduction(U, factors), 2e-2)


def test_gradients_are_those_of_the_modes():
    def loss(u, k):
        return (conduct(u, k) ** 2).sum()

    d_u, d_k = jax.jit(jax.grad(loss, (0, 1)))(U, K)
    modes = np.einsum("nx,bxyc,my->bnmc", dct_matrix(6), U, dct_matrix(5))
    slope = -2 * rates(6, 5)[..., None]
    close(d_k, (modes**2).sum(0) * slope * np.exp(slope * K), 1e-4)
    close(d_u, 2 * conduct(U, 2 * K), 1e-5)
