"""Stateless image operations: every random draw is a function of (seed, epoch, index, purpose). numpy and Pillow only.

Nothing here keeps a generator between examples, so an example looks the same whichever process, thread or
resumed run makes it.
"""

import math

import numpy as np
from PIL import Image

_MASK = (1 << 64) - 1

# What a draw is for. Two purposes of one example are independent; the numbers must never change meaning.
PURPOSES = {
    "crop": 1, "flip": 2, "quarter": 3, "order": 4, "files": 5, "photos": 6, "noise": 7, "crop2": 8, "flip2": 9,
    "scenes": 10,
}  # fmt: skip

# Evaluation keeps this share of the shorter side: 224 out of 256, the usual protocol.
CENTRE_SHARE = 0.875


def mix(x):
    """One step of splitmix64: uint64 (a Python int or a numpy array) -> uint64 of the same kind, a bijection."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def bits(seed, epoch, index, purpose):
    """64 random bits for each example.

    `seed` is an int; `epoch` and `index` are ints, or integer arrays that broadcast (then uint64 comes back in
    their shape); `purpose` is a key of `PURPOSES`. Unlike numpy's generators, this is the same under every numpy.
    """
    h = mix((int(seed) & _MASK) ^ mix(PURPOSES[purpose]))
    return mix(mix(h ^ _unsigned(epoch)) ^ _unsigned(index))


def _unsigned(x):
    return x.astype(np.uint64) if isinstance(x, np.ndarray) else int(x) & _MASK


def rng(seed, epoch, index, purpose):
    """numpy.random.Generator (Philox) of one example and one purpose; making it takes about 10 microseconds."""
    return np.random.Generator(np.random.Philox(key=bits(seed, epoch, index, purpose)))


def uniforms(seed, epochs, indices, purpose, count):
    """Return the first `count` numbers of `rng(...).random`, for many examples at once: float64 [c, count].

    epochs, indices: int64 [c]. Philox is computed here as numpy computes it, all examples together: a generator for each of
    them takes ten times as long.
    """
    blocks = -(-count // 4)
    shape = (len(indices), blocks)
    keys = [np.broadcast_to(bits(seed, epochs, indices, purpose)[:, None], shape), np.zeros(shape, np.uint64)]
    words = [np.zeros(shape, np.uint64) for _ in range(4)]
    words[0] += np.arange(1, 1 + blocks, dtype=np.uint64)
    for _ in range(10):
        (high0, low0), (high1, low1) = _product(0xD2E7470EE14C6C93, words[0]), _product(0xCA5A826395121157, words[2])
        words = [high1 ^ words[1] ^ keys[0], low1, high0 ^ words[3] ^ keys[1], low0]
        keys = [keys[0] + np.uint64(0x9E3779B97F4A7C15), keys[1] + np.uint64(0xBB67AE8584CAA73B)]
    drawn = np.stack(words, -1).reshape(len(indices), -1)[:, :count]
    return (drawn >> np.uint64(11)) * 2.0**-53


def _product(factor, x):
    """Return the upper and the lower 64 bits of factor * x, an int and uint64 [...]."""
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    a1, a0, x1, x0 = np.uint64(factor >> 32), np.uint64(factor & 0xFFFFFFFF), x >> half, x & low
    middle = a1 * x0 + (a0 * x0 >> half)
    other = a0 * x1 + (middle & low)
    return a1 * x1 + (middle >> half) + (other >> half), x * np.uint64(factor)


def random_resized_crop_box(generator, height, width, scale, ratio):
    """(top, left, height, width) in pixels of a random box, by Inception's rule (as in torchvision).

    `scale` = (least, most) share of the image's area, `ratio` = (least, most) width / height, drawn uniformly in
    its logarithm. Ten tries; where none fits, the largest central box whose ratio is in range.
    """
    draws = generator.random((10, 2))
    place = generator.random(2)
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for area_draw, ratio_draw in draws.tolist():
        area = height * width * (scale[0] + (scale[1] - scale[0]) * area_draw)
        aspect = math.exp(log_low + (log_high - log_low) * ratio_draw)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(place[0] * (height - h + 1)), int(place[1] * (width - w + 1))
            return top, left, h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w = min(width, max(1, round(height * aspect)))
    h = min(height, max(1, round(width / aspect)))
    return (height - h) // 2, (width - w) // 2, h, w


def centre_box(height, width, size):
    """(top, left, height, width) of the evaluation crop.

    Scaling this box to `size` is the same as scaling the shorter side to size / 0.875 and cutting out the centre.
    An image that is already size x size is kept whole.
    """
    if height == width == size:
        return 0, 0, height, width
    side = max(1, round(min(height, width) * CENTRE_SHARE))
    return (height - side) // 2, (width - side) // 2, side, side


def crop_resize(image, box, size, mirrored=False):
    """uint8[H, W, 3] and a box (top, left, height, width) -> uint8[size, size, 3], bicubic with antialiasing.

    The box is cut out first, so that no pixel outside it has any influence: a decoder that only decodes the box
    gives the same result.
    """
    top, left, height, width = box
    return resize(image[top : top + height, left : left + width], size, mirrored)


def resize(image, size, mirrored=False):
    """uint8[h, w, 3] -> uint8[size, size, 3], bicubic with antialiasing; a copy where it has that size already.

    `mirrored`: left for right, once it has that size.
    """
    if image.shape[:2] == (size, size):
        return flip(image) if mirrored else np.array(image)
    picture = Image.fromarray(np.ascontiguousarray(image)).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else picture)


def resize_window(image, window, size):
    """uint8[H, W, 3], its part `window` (left, top, right, bottom; fractions of a pixel too) -> uint8[*size, 3].

    `size` is (height, width). Bicubic with antialiasing, as if the whole image were scaled and then cut: pixels just
    outside the window have their share in those at its border.
    """
    picture = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC, box=window))


def centre(image, size):
    """uint8[H, W, 3] -> uint8[size, size, 3]: the evaluation crop."""
    return crop_resize(image, centre_box(*image.shape[:2], size), size)


def flip(image):
    """uint8[H, W, 3] -> its left-right mirror image."""
    mirrored = np.empty_like(image)
    for channel in range(image.shape[2]):  # numpy takes a fifth of the time for it that it takes pixel by pixel
        mirrored[..., channel] = image[:, ::-1, channel]
    return mirrored


def flips(seed, epoch, index, purpose="flip"):
    """Whether this example is mirrored, with probability one half: bool (or bool[...] for arrays)."""
    return (bits(seed, epoch, index, purpose) >> 63) == 1
