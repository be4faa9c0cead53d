"""RandAugment: each operation against Pillow's, how operations are drawn; random erasing: what is erased, and by what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from qbheat_jax.data.sources import photos
from qbheat_jax.ops import rand_augment, resample, shear
from qbheat_jax.ops.rand_augment import NONE, OPERATIONS, Erasing, RandAugment

FILL = (124, 116, 104)
# The last level is where a threshold and a number of bits are at their limits.
LEVELS = ((0.0, 1), (3.3, -1), (9.0, 1), (9.4, -1), (10.0, 1))
# One program serves several tests: each operation, and none, at each level on each of four images.
APPLY, COUNT = jax.jit(rand_augment.apply), (NONE + 1) * len(LEVELS) * 4


def images():
    """A photograph, noise, few values (most of a table is empty), and one value a channel; 44 x 56."""
    generator = np.random.default_rng(0)
    photo = np.asarray(Image.fromarray(photos.load("coffee")).crop((100, 0, 500, 400)).resize((56, 44)))
    made = [photo, generator.integers(0, 256, (44, 56, 3)), generator.choice([60, 61, 90], (44, 56, 3))]
    return np.stack([*made, np.full((44, 56, 3), (7, 130, 255))]).astype(np.uint8)


def pillow(name, image, level, sign, rotation=Image.Resampling.BICUBIC):
    """The operation as timm's `rand-m9-mstd0.5-inc1` calls Pillow."""
    image, signed = Image.fromarray(image), sign * level / 10

    def moved(*matrix):
        return image.transform(
            image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BICUBIC, fillcolor=FILL
        )

    def enhanced(enhancer):
        return enhancer(image).enhance(max(0.1, 1 + 0.9 * signed))

    def added(value):
        return min(255, value + int(level / 10 * 110)) if value < 128 else value

    made = {
        "auto_contrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
        "invert": lambda: ImageOps.invert(image),
        "posterize": lambda: ImageOps.posterize(image, max(1, 4 - int(level / 10 * 4))),
        "solarize": lambda: ImageOps.solarize(image, 256 - int(level / 10 * 256)),
        "solarize_add": lambda: image.point([added(value) for value in range(256)] * 3),
        "brightness": lambda: enhanced(ImageEnhance.Brightness),
        "contrast": lambda: enhanced(ImageEnhance.Contrast),
        "colour": lambda: enhanced(ImageEnhance.Color),
        "sharpness": lambda: enhanced(ImageEnhance.Sharpness),
        "rotate": lambda: image.rotate(30 * signed, rotation, fillcolor=FILL),
        "shear_x": lambda: moved(1, 0.3 * signed, 0, 0, 1, 0),
        "shear_y": lambda: moved(1, 0, 0, 0.3 * signed, 1, 0),
        "translate_x": lambda: moved(1, 0, 0.45 * signed * image.width, 0, 1, 0),
        "translate_y": lambda: moved(1, 0, 0, 0, 1, 0.45 * signed * image.height),
    }[name]()
    return np.asarray(made)


@pytest.fixture(scope="module")
def everything():
    """(images, {operation: uint8 [levels, images, H, W, 3]}) by one program, as a batch of a run."""
    planes, count = resample.to_planes(jnp.asarray(images())), len(images())
    which, level, image = np.meshgrid(range(len(OPERATIONS) + 1), range(len(LEVELS)), range(count), indexing="ij")
    levels, signs = np.array(LEVELS, np.float32)[level.ravel()].T
    made = APPLY(planes[image.ravel()], jnp.asarray(which.ravel(), jnp.int32), levels, signs)
    made = np.asarray(resample.from_planes(made)).reshape(*which.shape, *images().shape[1:])
    return images(), dict(zip([*OPERATIONS, "none"], made))


@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "rotate"])
def test_an_operation_is_pillows(everything, name):
    """Up to a rounding where Pillow, which has more bits, comes out at a whole number."""
    given, made = everything
    for (level, sign), results in zip(LEVELS, made[name]):
        for number, (image, got) in enumerate(zip(given, results)):
            error = np.abs(pillow(name, image, level, sign).astype(int) - got)
            assert error.max() <= 1 and (error > 0).mean() < 0.01, f"image {number} at {sign} x {level}"


def test_a_rotation_is_near_pillows(everything):
    """Three interpolations instead of one: nearer to Pillow's bicubic than Pillow's bilinear is, and filled alike."""
    given, made = everything
    for (level, sign), results in list(zip(LEVELS, made["rotate"]))[1:]:
        for image, got in zip(given[[0, 3]], results[[0, 3]]):
            expected = pillow("rotate", image, level, sign).astype(int)
            other = pillow("rotate", image, level, sign, Image.Resampling.BILINEAR).astype(int)
            filled = (expected == FILL).all(-1)
            assert filled.mean() > 0.05 and (filled != (got == FILL).all(-1)).mean() < 0.002
            error, between = (np.abs(expected - x)[~filled].mean() for x in (got, other))
            assert error <= 0.7 * between


def test_no_operation_is_the_identity(everything):
    given, made = everything
    np.testing.assert_array_equal(made["none"], np.broadcast_to(given, made["none"].shape))
    np.testing.assert_array_equal(made["rotate"][0], given)  # and so is a rotation by nothing


@pytest.mark.parametrize("axis", [1, 2])
def test_lines_roll_alike_on_every_platform(axis):
    canvas = jnp.asarray(np.random.default_rng(0).integers(0, 2**30, (2, 9, 13)), jnp.int32)
    steps = jnp.asarray(np.random.default_rng(1).integers(-30, 30, (2, canvas.shape[3 - axis])))
    got, expected = (roll(canvas, steps, axis) for roll in (shear._roll_by_bits, shear._roll))
    np.testing.assert_array_equal(got, expected)
    line, rolled = (np.asarray(x[1, 4] if axis == 2 else x[1, :, 4]) for x in (canvas, expected))
    np.testing.assert_array_equal(rolled, np.roll(line, -int(steps[1, 4])))


def test_tables_are_the_same_on_every_platform():
    generator = np.random.default_rng(0)
    pixels = jnp.asarray(generator.integers(0, 256, (2, 3, 2000)))
    tables = jnp.asarray(generator.integers(0, 256, (2, 3, 256)))
    np.testing.assert_array_equal(rand_augment._count_by_products(pixels), rand_augment._count(pixels))
    np.testing.assert_array_equal(rand_augment._find_by_products(pixels, tables), rand_augment._find(pixels, tables))
    assert rand_augment._count(pixels)[1, 2, 7] == (pixels[1, 2] == 7).sum()
    assert rand_augment._find(pixels, tables)[1, 2, 0] == tables[1, 2, pixels[1, 2, 0]]


def test_operations_are_drawn_for_each_image():
    which, level, sign = jax.jit(RandAugment(9.0).draw, static_argnums=1)(jax.random.key(0), 20_000)
    shares = np.bincount(which, minlength=NONE + 1) / len(which)
    np.testing.assert_allclose(shares, [*[0.5 / NONE] * NONE, 0.5], atol=0.01)
    assert abs(level.mean() - 9) < 0.02 and abs(level.std() - 0.5) < 0.03 and level.max() == 10
    assert set(np.unique(sign)) == {-1, 1} and abs(sign.mean()) < 0.03


def test_an_image_is_augmented_by_its_place_and_the_key():
    """Two layers one after the other; what else is in the batch does not matter."""
    augment, given, key = RandAugment(9.0), jnp.asarray(images()), jax.random.key(3)
    run = jax.jit(augment.__call__)
    made = np.asarray(run(given, key))
    assert made.dtype == np.uint8 and (made != given).any((1, 2, 3)).any()
    # By the program that the other tests have compiled, in a batch of its size.
    padded = jnp.zeros((COUNT, 3, 44, 56), jnp.uint8).at[: len(given)].set(resample.to_planes(given))
    for layer in jax.random.split(key, 2):
        draws = (np.pad(x, (0, COUNT - len(given))) for x in augment.draw(layer, len(given)))
        padded = APPLY(padded, *draws)
    np.testing.assert_array_equal(made, resample.from_planes(padded[: len(given)]))
    np.testing.assert_array_equal(run(given.at[1:].set(0), key)[0], made[0])
    assert (np.asarray(run(given, jax.random.key(4))) != made).any()


@pytest.mark.parametrize("prob", [1.0, 0.25])
def test_erasing_puts_noise_into_a_box(prob):
    count, height, width = 400, 40, 48
    given = jnp.full((count, height, width, 3), 9.0)
    made = np.asarray(jax.jit(Erasing(prob))(given, jax.random.key(0)))
    erased = (made != 9).all(-1)
    np.testing.assert_array_equal(made[~erased], 9)
    assert abs(erased.any((1, 2)).mean() - prob) < (1e-9 if prob == 1 else 0.06)
    noise = made[erased]
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    rows, columns = erased.any(2).sum(1), erased.any(1).sum(1)
    np.testing.assert_array_equal(rows * columns, erased.sum((1, 2)))  # a box
    some = rows > 0
    area, aspect = rows[some] * columns[some] / (height * width), rows[some] / columns[some]
    assert 0.015 < area.min() < 0.03 and 0.31 < area.max() < 0.36 and abs(area.mean() - 0.1767) < 0.02
    assert 0.2 < aspect.min() < 0.4 and 2.5 < aspect.max() < 4.5 and abs(np.log(aspect).mean()) < 0.15
    centres = [(erased.any(axis) * np.arange(n)).sum(1)[some] / size[some] for axis, n, size in (
        (2, height, rows), (1, width, columns)
    )]  # fmt: skip
    assert all(abs(c.mean() / (n - 1) - 0.5) < 0.05 for c, n in zip(centres, (height, width)))
