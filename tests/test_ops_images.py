"""Pixels to numbers and back without loss; patches in the order that is written down."""

import jax.numpy as jnp
import numpy as np
import pytest

from qbheat_jax.ops import images

PIXELS = images.Pixels()


def test_normalise_round_trip_is_exact_for_every_byte():
    every = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, 1)
    pixels = PIXELS.normalise(every)
    assert pixels.dtype == jnp.float32
    back = PIXELS.unnormalise(pixels)
    assert back.dtype == jnp.uint8
    np.testing.assert_array_equal(back, every)


def test_normalise_takes_the_mean_and_deviation_of_each_channel_out():
    scaled = np.array([[0, 0, 0], [255, 255, 255]], np.uint8)
    expected = (np.array([[0.0], [1.0]]) - images.MEAN) / images.STD
    np.testing.assert_allclose(PIXELS.normalise(scaled), expected, rtol=1e-6)
    other = images.Pixels(mean=(0.5, 0.0, 1.0), std=(0.5, 1.0, 2.0))
    np.testing.assert_allclose(other.normalise(scaled), [[-1, 0, -0.5], [1, 1, 0]], atol=1e-6)
    np.testing.assert_array_equal(other.unnormalise(other.normalise(scaled)), scaled)


def test_unnormalise_rounds_and_clips():
    unit = images.Pixels(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    pixels = np.array([-0.3, 1.7, 99.6 / 255], np.float32)
    np.testing.assert_array_equal(unit.unnormalise(pixels), [0, 255, 100])


@pytest.mark.parametrize("size,height,width,channels", [(1, 3, 2, 3), (2, 4, 6, 3), (4, 8, 4, 5), (16, 16, 32, 3)])
def test_patches_come_back_and_are_in_order(size, height, width, channels):
    x = np.arange(2 * height * width * channels).reshape(2, height, width, channels)
    patches = np.asarray(images.to_patches(x, size))
    assert patches.shape == (2, height // size, width // size, size * size * channels)
    for b, i, j in np.ndindex(patches.shape[:3]):
        window = x[b, i * size : (i + 1) * size, j * size : (j + 1) * size]
        np.testing.assert_array_equal(patches[b, i, j], window.reshape(-1))
    np.testing.assert_array_equal(images.from_patches(patches, size), x)
