"""The heat equation on pixels: closed forms, a direct solution of the same equations, and what blending keeps and takes away."""

import jax.numpy as jnp
import numpy as np
import pytest

from qbheat_jax import harmonic, quarters


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


@pytest.mark.parametrize("height, width", [(16, 16), (8, 24), (20, 12)])
@pytest.mark.parametrize("quarter", range(9))
def test_the_steady_state_is_that_of_a_direct_solution(quarter, height, width):
    images = np.random.default_rng(quarter).normal(size=(2, height, width, 3))
    known = known_of(quarter, height, width, 2)
    found = harmonic.settle(jnp.asarray(images, jnp.float32), known)
    for image, one, k in zip(images, found, np.asarray(known)):
        np.testing.assert_allclose(one, solved(image, k), atol=1e-2)


def test_between_two_held_sides_the_temperature_is_a_ramp():
    images = np.zeros((1, 8, 33, 1), np.float32)
    images[:, :, -1] = 32.0
    known = np.zeros((1, 8, 33), bool)
    known[:, :, [0, -1]] = True
    found = harmonic.settle(jnp.asarray(images), jnp.asarray(known))
    np.testing.assert_allclose(found[0, :, :, 0], np.broadcast_to(np.arange(33.0), (8, 33)), atol=1e-2)


@pytest.mark.parametrize("quarter", (0, 4, 5))
def test_one_colour_fills_the_image(quarter):
    images = jnp.full((1, 64, 64, 3), 7.0)
    known = known_of(quarter, 64, 64)
    np.testing.assert_allclose(harmonic.settle(jnp.where(known[..., None], images, -5.0), known), images, atol=2e-2)


@pytest.mark.parametrize("quarter", (0, 4))
def test_an_image_predicted_but_for_a_constant_is_the_image(quarter):
    """What blending takes away is the seam; steps within the prediction stay."""
    images = jnp.asarray(np.random.default_rng(0).normal(size=(3, 32, 32, 3)), jnp.float32)
    tint = jnp.asarray([[[[1.0, -2.0, 0.5]]]])
    # No pixel on the far side of the seam may differ from its visible neighbour: those two are what is made to meet.
    smooth = jnp.repeat(jnp.repeat(images[:, ::4, ::4], 4, 1), 4, 2)
    known = known_of(quarter, 32, 32, 3)
    found = harmonic.blend(smooth + tint, smooth, known)
    assert (np.asarray(found)[np.asarray(known)] == np.asarray(smooth)[np.asarray(known)]).all()
    within = np.abs(np.diff(np.asarray(found - smooth), axis=2))
    hidden = ~np.asarray(known)[..., None]
    # Harmonic: no pixel is further from the truth than the largest step at the seam.
    largest = np.abs(np.diff(np.asarray(smooth), axis=2)).max() + np.abs(np.diff(np.asarray(smooth), axis=1)).max()
    assert within[hidden[:, :, 1:].repeat(3, -1)].max() < largest


def test_a_prediction_that_meets_the_known_pixels_is_left_alone():
    rows = jnp.arange(32.0)[:, None, None]
    images = jnp.broadcast_to(rows // 2, (1, 32, 32, 3))  # equal on both sides of the seam, at row 16 too
    images = jnp.where(rows == 16, 7.0, images)
    known = known_of(0, 32, 32)
    np.testing.assert_allclose(harmonic.blend(images, images, known), images, atol=1e-5)


def test_without_a_known_pixel_nothing_is_made_up():
    assert (np.asarray(harmonic.settle(jnp.ones((1, 8, 8, 3)), jnp.zeros((1, 8, 8), bool))) == 0).all()
