"""Crop and resize inside jit against Pillow's."""

import jax
import numpy as np
import pytest
from PIL import Image

from qbheat_jax.data import augment
from qbheat_jax.data.sources import photos
from qbheat_jax.ops import resample

crop_resize = jax.jit(resample.crop_resize, static_argnames="size")


@pytest.fixture(scope="module")
def coffee():
    return photos.load("coffee")[:150, :190]


def boxes(count, height, width, wide):
    """Random boxes at least as wide as high, or higher than wide."""
    ratio = (1.0, 2.5) if wide else (0.4, 0.95)
    drawn = (
        augment.random_resized_crop_box(augment.rng(0, 0, k, "crop"), height, width, (0.02, 1.0), ratio)
        for k in range(4 * count)
    )
    return [box for box in drawn if (box[3] >= box[2]) == wide][:count]


def both(image, some, size):
    """-> (ours, Pillow's), int [count, size, size, 3] each."""
    ours = crop_resize(np.stack([image] * len(some)), np.array(some, np.float32), size=size)
    assert ours.dtype == np.uint8 and ours.shape == (len(some), size, size, 3)
    return np.asarray(ours, int), np.stack([augment.crop_resize(image, box, size) for box in some]).astype(int)


@pytest.mark.parametrize("size", [16, 64, 160])
@pytest.mark.parametrize("noise", [False, True])
def test_boxes_at_least_as_wide_as_high_are_pillows_but_for_a_level_in_a_thousand(coffee, size, noise):
    """Smaller, larger and in between; noise is the worst case: every tap and every overshoot counts."""
    image = np.random.default_rng(0).integers(0, 256, coffee.shape, np.uint8) if noise else coffee
    ours, pillows = both(image, boxes(12, *image.shape[:2], wide=True), size)
    assert np.abs(ours - pillows).max() <= 1
    assert (ours != pillows).mean() < 1e-3


@pytest.mark.parametrize("size", [16, 64, 160])
def test_high_boxes_are_pillows_but_for_the_rounding_between_the_passes(coffee, size):
    """Pillow 13 takes the columns first there, where older ones take the rows."""
    ours, pillows = both(coffee, boxes(12, *coffee.shape[:2], wide=False), size)
    assert (np.abs(ours - pillows) <= 1).mean() > 0.995
    assert np.abs(ours - pillows).max() <= 8


def test_a_box_of_the_size_asked_for_is_copied(coffee):
    (ours,) = crop_resize(coffee[None], np.float32([[7, 11, 64, 64]]), size=64)
    np.testing.assert_array_equal(ours, coffee[7:71, 11:75])


def test_a_box_with_fractions_is_pillows(coffee):
    box = (10.25, 20.5, 90.75, 100.125)
    (ours,) = np.asarray(crop_resize(coffee[None], np.float32([box]), size=48), int)
    top, left, height, width = box
    # Pillow takes taps from outside its box, so only what lies within their reach of an edge may differ.
    picture = Image.fromarray(coffee).resize(
        (48, 48), Image.Resampling.BICUBIC, (left, top, left + width, top + height)
    )
    assert np.abs(ours - np.asarray(picture))[2:-2, 2:-2].max() <= 1


def test_no_pixel_outside_the_box_has_any_influence(coffee):
    box = np.float32([[20, 30, 50, 70]])
    other = 255 - coffee
    other[20:70, 30:100] = coffee[20:70, 30:100]
    for size in (32, 100):
        np.testing.assert_array_equal(
            crop_resize(coffee[None], box, size=size), crop_resize(other[None], box, size=size)
        )


def test_flip_mirrors_the_examples_asked_for(coffee):
    images, box = np.stack([coffee] * 2), np.float32([[5, 9, 60, 80]] * 2)
    plain = np.asarray(crop_resize(images, box, size=32))
    flipped = np.asarray(crop_resize(images, box, size=32, flip=np.array([True, False])))
    np.testing.assert_array_equal(flipped[0], plain[0][:, ::-1])
    np.testing.assert_array_equal(flipped[1], plain[1])
    assert (flipped[0] != plain[0]).any()


def test_an_example_looks_the_same_in_any_batch(coffee):
    some = np.array(boxes(6, *coffee.shape[:2], wide=True), np.float32)
    together = np.asarray(crop_resize(np.stack([coffee] * 6), some, size=40))
    alone = np.concatenate([crop_resize(coffee[None], box[None], size=40) for box in some])
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize("start,length", [(0.0, 16.0), (3.0, 200.0), (10.5, 61.25), (250.0, 1.0)])
def test_weights_sum_to_one_and_stay_inside(start, length):
    table = np.asarray(resample.weights(np.float32([start]), np.float32([length]), 256, 32))[0]
    assert np.abs(table.sum(1) / 2**22 - 1).max() < 1e-5
    used = np.flatnonzero(table.any(0))
    assert used.min() >= int(start) and used.max() < np.ceil(start + length)


def test_digits_put_a_weight_together_again():
    values = np.array([0, 1, -1, 127, 128, -129, 2**22, -(2**20) + 77, 5_000_000])
    digits = [np.asarray(digit) for digit in resample._digits(values)]
    assert all(np.abs(digit).max() <= 128 for digit in digits)
    np.testing.assert_array_equal(sum(digit << (8 * k) for k, digit in enumerate(digits)), values)
