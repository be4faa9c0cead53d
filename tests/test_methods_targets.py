"""What a cell is asked for: histograms of gradients in closed form, the order of the parts, and the error of each."""

import jax.numpy as jnp
import numpy as np
import pytest

from qbheat_jax.methods.common.targets import BINS, Target, oriented_gradients

SIZE = 4


def ramp(degrees, strength=1.0, shape=(1, 12, 16, 3)):
    """Images whose brightness grows in one direction, at `degrees` from the x axis towards y (down)."""
    angle = np.deg2rad(degrees)
    rows, columns = np.mgrid[: shape[1], : shape[2]]
    values = strength * (np.cos(angle) * columns + np.sin(angle) * rows)
    return jnp.asarray(np.broadcast_to(values[None, ..., None], shape), jnp.float32)


def inner(images):
    """The histogram of a cell away from the border [BINS], which is that of every channel."""
    cell = np.asarray(oriented_gradients(images, SIZE))[0, 1, 1].reshape(3, BINS)
    np.testing.assert_array_equal(cell, np.broadcast_to(cell[:1], cell.shape))
    return cell[0]


@pytest.mark.parametrize("bin_", range(BINS))
def test_a_ramp_along_the_middle_of_a_bin_votes_for_it_alone(bin_):
    expected = np.eye(BINS)[bin_]
    np.testing.assert_allclose(inner(ramp(bin_ * 180 / BINS)), expected, atol=1e-3)
    # The other way round, and however steep, the edges run the same way.
    np.testing.assert_allclose(inner(ramp(bin_ * 180 / BINS + 180, strength=0.3)), expected, atol=1e-3)


def test_a_direction_between_two_bins_is_shared():
    width = 180 / BINS
    np.testing.assert_allclose(inner(ramp(2.25 * width))[2:4], np.array([0.75, 0.25]) / np.hypot(0.75, 0.25), atol=1e-3)
    # The circle closes: between the last bin and the first.
    np.testing.assert_allclose(inner(ramp(-0.5 * width))[[0, -1]], [np.sqrt(0.5)] * 2, atol=1e-3)


def test_histograms_against_a_loop_over_pixels():
    images = np.random.default_rng(0).normal(size=(2, 8, 12, 3)).astype(np.float32)
    found = np.asarray(oriented_gradients(jnp.asarray(images), SIZE))
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge").astype(np.float64)
    expected = np.zeros((2, 2, 3, 3, BINS))
    for b, i, j, c in np.ndindex(*images.shape):
        dy, dx = (
            padded[b, i + 2, j + 1, c] - padded[b, i, j + 1, c],
            padded[b, i + 1, j + 2, c] - padded[b, i + 1, j, c],
        )
        place = np.arctan2(dy, dx) / np.pi * BINS % BINS
        low = int(place)
        for k, share in ((low, 1 - (place - low)), (low + 1, place - low)):
            expected[b, i // SIZE, j // SIZE, c, k % BINS] += share * np.hypot(dx, dy)
    expected /= np.sqrt((expected**2).sum(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(found, expected.reshape(2, 2, 3, 3 * BINS), atol=1e-5)


def test_a_flat_image_has_no_direction_and_no_nan():
    assert (np.asarray(oriented_gradients(jnp.ones((1, 8, 8, 3)), SIZE)) == 0).all()


def test_parts_their_order_and_their_weights():
    images = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8, 8, 3)), jnp.float32)
    target = Target(SIZE, norm_pix=True, statistics=0.5, hog=3.0)
    assert target.widths == {"pixels": 48, "statistics": 2, "hog": 27}
    cells = np.asarray(target(images))
    assert cells.shape == (2, 2, 2, 77)
    np.testing.assert_array_equal(cells[..., 50:], oriented_gradients(images, SIZE))
    guess = np.random.default_rng(2).normal(size=cells.shape)
    squared = (guess - cells) ** 2
    expected = squared[..., :48].mean(-1) + 0.5 * squared[..., 48:50].mean(-1) + 3.0 * squared[..., 50:].sum(-1) / 3
    np.testing.assert_allclose(target.error(guess, cells), expected, rtol=1e-5)
    # A perfect prediction gives the pixels back, with its own statistics.
    np.testing.assert_allclose(target.pixels(cells, images), Target(SIZE)(images), atol=1e-5)


@pytest.mark.parametrize(
    "asked, width", [({}, 48), ({"statistics": 1.0}, 48), ({"norm_pix": True}, 48), ({"hog": 1.0}, 75)]
)
def test_what_is_not_asked_for_takes_no_outputs(asked, width):
    target = Target(SIZE, **asked)
    assert sum(target.widths.values()) == width == target(jnp.zeros((1, 8, 8, 3))).shape[-1]
