"""Colours and blur: each operation against its definition (Pillow's, colorsys's), and how the random ones are drawn."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance

from qbheat_jax.ops import colour


def bytes_of(seed=0, shape=(5, 9, 11, 3)):
    images = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    images[0, :4, 0] = [[0, 0, 0], [255, 255, 255], [7, 7, 7], [255, 0, 0]]  # without a hue, and at the rim
    return images


def unit(images):
    return jnp.asarray(images, jnp.float32) / 255.0


FACTORS = np.array([0.0, 0.6, 1.0, 1.4, 2.0], np.float32)


@pytest.mark.parametrize(
    "ours, pillows",
    [
        (colour.brightness, ImageEnhance.Brightness),
        (colour.contrast, ImageEnhance.Contrast),
        (colour.saturation, ImageEnhance.Color),
    ],
)
def test_blends_are_pillows(ours, pillows):
    images = bytes_of()
    made = np.asarray(ours(unit(images), FACTORS)) * 255
    assert made.min() >= 0 and made.max() <= 255
    for image, factor, got in zip(images, FACTORS, made):
        expected = np.asarray(pillows(Image.fromarray(image)).enhance(float(factor)), np.float64)
        # Pillow rounds the grey values, and the result downwards.
        np.testing.assert_allclose(got, expected, atol=2.01)
    np.testing.assert_allclose(made[2], images[2], atol=1e-3)


def test_hue_is_colorsyss():
    images = bytes_of()
    shifts = np.array([-0.5, -0.1, 0.0, 0.1, 0.37], np.float32)
    made = np.asarray(colour.hue(unit(images), shifts))
    for image, shift, got in zip(np.asarray(unit(images), np.float64), shifts, made):
        for place in np.ndindex(image.shape[:2]):
            h, s, v = colorsys.rgb_to_hsv(*image[place])
            np.testing.assert_allclose(got[place], colorsys.hsv_to_rgb((h + shift) % 1, s, v), atol=1e-5)


def test_grey_is_pillows():
    images = bytes_of()
    made = np.asarray(colour.grey(unit(images)))[..., 0] * 255
    for image, got in zip(images, made):
        np.testing.assert_allclose(got, np.asarray(Image.fromarray(image).convert("L"), np.float64), atol=0.51)


def test_blur_is_a_convolution_with_the_gaussian():
    images = np.asarray(unit(bytes_of(1, (3, 8, 10, 3))), np.float64)
    sigmas = np.array([0.01, 0.7, 1.5])
    made = np.asarray(colour.blur(jnp.asarray(images, jnp.float32), jnp.asarray(sigmas, jnp.float32), 1.5))
    np.testing.assert_allclose(made[0], images[0], atol=1e-6)  # as good as none
    for image, sigma, got in list(zip(images, sigmas, made))[1:]:
        offsets = np.arange(-5, 6)
        weights = np.exp(-0.5 * (offsets / sigma) ** 2)
        weights /= weights.sum()
        padded = np.pad(image, ((5, 5), (5, 5), (0, 0)), mode="edge")
        kernel = weights[:, None] * weights
        for i, j in np.ndindex(8, 10):
            expected = (padded[i : i + 11, j : j + 11] * kernel[..., None]).sum((0, 1))
            np.testing.assert_allclose(got[i, j], expected, atol=1e-5)


def test_jitter_takes_all_orders_and_amounts_within_its_range():
    """One colour for all: each image comes out as one of the 24 orders of the four operations would make it."""
    count = 96
    images = jnp.broadcast_to(jnp.asarray([0.8, 0.4, 0.3]), (count, 2, 2, 3))
    jitter = colour.Jitter(0.4, 0.4, 0.4, 0.1)
    key = jax.random.key(0)
    made = np.asarray(jax.jit(jitter)(images, key))
    order_rng, amount_rng = jax.random.split(key)
    order = np.argsort(jax.random.uniform(order_rng, (count, 4)), -1)
    amounts = np.asarray(jax.random.uniform(amount_rng, (count, 4)))
    amounts = np.array([0.6, 0.6, 0.6, -0.1]) + amounts * np.array([0.8, 0.8, 0.8, 0.2])
    assert len({tuple(o) for o in order}) > 20
    steps = (colour.brightness, colour.contrast, colour.saturation, colour.hue)
    for n in range(0, count, 16):
        expected = images[n : n + 1]
        for which in order[n]:
            expected = steps[which](expected, jnp.asarray(amounts[n, which : which + 1], jnp.float32))
        np.testing.assert_allclose(made[n], expected[0], atol=1e-5)
    assert np.ptp(made[:, 0, 0], 0).min() > 0.1


def test_jitter_of_nothing_changes_nothing():
    images = unit(bytes_of())
    np.testing.assert_allclose(colour.Jitter()(images, jax.random.key(1)), images, atol=1e-6)


def test_random_apply():
    images = unit(bytes_of(0, (2000, 4, 1, 3)))
    made = colour.random_apply(lambda x, _: x + 2, images, jax.random.key(0), 0.8)
    changed = np.asarray(made > 1.5).all((1, 2, 3))
    assert abs(changed.mean() - 0.8) < 0.03
    np.testing.assert_array_equal(made[~changed], images[~changed])
