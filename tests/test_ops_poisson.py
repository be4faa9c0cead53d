"""The heat equation on pixels: closed forms, a direct solution of the same equations, what blending keeps and takes away."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qbheat_jax.ops import poisson, quarters

solve, blend = jax.jit(poisson.solve), jax.jit(poisson.blend)


def known_of(quarter, height, width, images=1):
    return jnp.broadcast_to(~quarters.masked(height, width)[quarter], (images, height, width))


def solved(image, known):
    """The steady state by a dense solver, pixel by pixel: each that is not known is the mean of its neighbours."""
    height, width, _ = image.shape
    matrix, right = np.zeros((height * width,) * 2), np.zeros((height * width, image.shape[-1]))
    for y, x in np.ndindex(height, width):
        row = y * width + x
        if known[y, x]:
            matrix[row, row], right[row] = 1, image[y, x]
            continue
        around = [(y + dy, x + dx) for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0))]
        for v, u in [(v, u) for v, u in around if 0 <= v < height and 0 <= u < width]:
            matrix[row, row] += 1
            matrix[row, v * width + u] -= 1
    return np.linalg.solve(matrix, right).reshape(image.shape)


@pytest.mark.parametrize("height, width", [(16, 16), (12, 20)])
@pytest.mark.parametrize("quarter", range(9))
def test_the_steady_state_is_that_of_a_direct_solution(quarter, height, width):
    images = np.random.default_rng(quarter).normal(size=(2, height, width, 3))
    known = known_of(quarter, height, width, 2)
    found = solve(jnp.asarray(images, jnp.float32), known)
    for image, one, k in zip(images, found, np.asarray(known)):
        np.testing.assert_allclose(one, solved(image, k), atol=1e-2)


def test_between_two_held_sides_the_temperature_is_a_ramp():
    images = np.zeros((1, 8, 33, 1), np.float32)
    images[:, :, -1] = 32.0
    known = np.zeros((1, 8, 33), bool)
    known[:, :, [0, -1]] = True
    found = solve(jnp.asarray(images), jnp.asarray(known))
    np.testing.assert_allclose(found[0, :, :, 0], np.broadcast_to(np.arange(33.0), (8, 33)), atol=1e-2)


@pytest.mark.parametrize("quarter", (0, 4, 5))
def test_one_colour_fills_the_image(quarter):
    images = jnp.full((1, 64, 64, 3), 7.0)
    known = known_of(quarter, 64, 64)
    np.testing.assert_allclose(solve(jnp.where(known[..., None], images, -5.0), known), images, atol=2e-2)


@pytest.mark.parametrize("quarter", (0, 4))
def test_what_is_predicted_but_for_a_tint_loses_the_tint_and_keeps_its_steps(quarter):
    # Pixels on both sides of a seam are alike, so that all that is to be taken away there is the tint.
    halves = (np.arange(32) + 1) // 2
    images = np.random.default_rng(0).normal(size=(3, 17, 17, 3))[:, halves][:, :, halves]
    known = known_of(quarter, 32, 32, 3)
    found = blend(jnp.asarray(images + [1.0, -2.0, 0.5]), jnp.asarray(images), known)
    np.testing.assert_allclose(found, images, atol=1e-2)
    assert (np.asarray(found)[np.asarray(known)] == images.astype(np.float32)[np.asarray(known)]).all()


def test_without_a_known_pixel_nothing_is_made_up():
    assert (np.asarray(solve(jnp.ones((1, 8, 8, 3)), jnp.zeros((1, 8, 8), bool))) == 0).all()
