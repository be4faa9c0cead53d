"""Stateless image operations: every random draw is a function of (seed, epoch, index, purpose). numpy and Pillow only.

No generator lives longer than one example, so an example looks the same in every process, thread and resumed run.
"""

import math

import numpy as np
from PIL import Image

_MASK = (1 << 64) - 1

# Purposes of draws. Two purposes of one example are independent. The numbers must never change.
PURPOSES = {
    "crop": 1, "flip": 2, "quarter": 3, "order": 4, "files": 5, "photos": 6, "noise": 7, "crop2": 8, "flip2": 9,
    "scenes": 10, "frames": 11, "shapes": 12,
    **{f"crop{n}": 100 + n for n in range(3, 100)},
    **{f"flip{n}": 200 + n for n in range(3, 100)},
}  # fmt: skip

# Evaluation keeps this fraction of the shorter side: 224 of 256, the usual protocol.
CENTRE_FRACTION = 0.875


def of_view(purpose, view):
    """Return the purpose of a draw for one of an example's views, 0 being the first.

    >>> of_view("crop", 0), of_view("crop", 1)
    ('crop', 'crop2')
    """
    return f"{purpose}{view + 1}" if view else purpose


def mix(x):
    """Return one step of splitmix64, a bijection of uint64; takes and returns a Python int or a numpy array."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def bits(seed, epoch, index, purpose):
    """Return 64 random bits for each example; unlike numpy's generators, they are the same in every numpy version.

    Args:
      seed: int.
      epoch, index: ints, or integer arrays that broadcast.
      purpose: a key of `PURPOSES`.

    Returns:
      int, or uint64 array of the broadcast shape.
    """
    h = mix((int(seed) & _MASK) ^ mix(PURPOSES[purpose]))
    return mix(mix(h ^ _unsigned(epoch)) ^ _unsigned(index))


def _unsigned(x):
    return x.astype(np.uint64) if isinstance(x, np.ndarray) else int(x) & _MASK


def rng(seed, epoch, index, purpose):
    """Return a numpy.random.Generator (Philox) for one example and purpose; creating it takes about 10 microseconds."""
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
    """Return a random box by Inception's rule, as torchvision does.

    Ten boxes are tried. If none fits, the result is the largest central box with a ratio in range.

    Args:
      generator: numpy.random.Generator.
      height, width: size of the image in pixels.
      scale: (min, max) fraction of the image's area, drawn uniformly.
      ratio: (min, max) of width / height, drawn uniformly in the logarithm.

    Returns:
      (top, left, height, width) in pixels.
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


# Positions of a multi-scale crop: down and right, in quarters of the free space.
_POSITIONS = (
    (0, 0), (0, 4), (4, 0), (4, 4), (2, 2), (0, 2), (4, 2), (2, 0), (2, 4), (1, 1), (1, 3), (3, 1), (3, 3),
)  # fmt: skip


def multi_scale_box(generator, height, width, scales):
    """Return a random box of fixed sizes and positions (multi-scale cropping of TSN, arXiv 1608.00859).

    Args:
      generator: numpy.random.Generator.
      height, width: size of the image in pixels.
      scales: sides of the box over the image's shorter side. Height and width are equal or neighbours in this tuple.

    Returns:
      (top, left, height, width) in pixels.
    """
    sides = [max(1, int(min(height, width) * scale)) for scale in scales]
    sizes = [(h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]
    size_draw, place_draw = generator.random(2).tolist()
    h, w = sizes[int(size_draw * len(sizes))]
    down, right = _POSITIONS[int(place_draw * len(_POSITIONS))]
    return (height - h) * down // 4, (width - w) * right // 4, h, w


def one_of_each_segment(count, draws):
    """Return a number from each of T segments of equal length of range(count); numbers repeat where count < T.

    Args:
      count: int.
      draws: float [T] in [0, 1), places within the segments.

    Returns:
      int64 [T], ascending.

    >>> one_of_each_segment(10, np.full(2, 0.5)).tolist()
    [2, 7]
    """
    numbers = (np.arange(len(draws)) + draws) * count / len(draws)
    return np.minimum(numbers.astype(np.int64), count - 1)


def centre_box(height, width, size):
    """Return (top, left, height, width) of the evaluation crop.

    Resizing this box to `size` equals resizing the shorter side to size / 0.875 and cropping the centre. An image of
    size x size is kept whole.
    """
    if height == width == size:
        return 0, 0, height, width
    side = max(1, round(min(height, width) * CENTRE_FRACTION))
    return (height - side) // 2, (width - side) // 2, side, side


def crop_resize(image, box, size, mirrored=False):
    """Crop a box and resize it with antialiased bicubic interpolation.

    The box is cut out first, so pixels outside have no influence. A decoder that decodes only the box gives the same
    result.

    Args:
      image: uint8 [H, W, 3].
      box: (top, left, height, width), ints.
      size: pixels a side of the result.
      mirrored: whether to mirror the result left to right.

    Returns:
      uint8 [size, size, 3].
    """
    top, left, height, width = box
    return resize(image[top : top + height, left : left + width], size, mirrored)


def resize(image, size, mirrored=False):
    """Resize uint8 [h, w, 3] to [size, size, 3], antialiased bicubic; an image of that size is copied.

    If `mirrored`, the result is then mirrored left to right.
    """
    if image.shape[:2] == (size, size):
        return flip(image) if mirrored else np.array(image)
    picture = Image.fromarray(np.ascontiguousarray(image)).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else picture)


def resize_window(image, window, size):
    """Resize a window of an image as if the whole image were resized and then cropped, antialiased bicubic.

    Pixels just outside the window thus influence those at its border.

    Args:
      image: uint8 [H, W, 3].
      window: (left, top, right, bottom) in pixels; fractions are allowed.
      size: (height, width) of the result.

    Returns:
      uint8 [*size, 3].
    """
    picture = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC, box=window))


def centre(image, size):
    """Return the evaluation crop of uint8 [H, W, 3] as uint8 [size, size, 3]."""
    return crop_resize(image, centre_box(*image.shape[:2], size), size)


def flip(image):
    """Return uint8 [H, W, 3] mirrored left to right."""
    mirrored = np.empty_like(image)
    for channel in range(image.shape[2]):  # five times as fast in numpy as copying whole pixels
        mirrored[..., channel] = image[:, ::-1, channel]
    return mirrored


def flips(seed, epoch, index, purpose="flip"):
    """Return whether an example is mirrored, with probability one half: bool, or a bool array for array arguments."""
    return (bits(seed, epoch, index, purpose) >> 63) == 1
