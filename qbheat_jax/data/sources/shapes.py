"""The `shapes` source: clips of moving shapes and the event frames that a camera would record. It works offline.

The class is the direction of motion, one of eight, in which all shapes of a clip move. Nothing else depends on it: shapes,
places, sizes, colours, speed and background are drawn for each clip, and shapes leave the image on one side and come back on
the other. A single RGB frame therefore shows nothing of the class. An event frame shows where the logarithm of brightness has
changed by more than a threshold since the frame before: 255 where it rose, 0 where it fell, 128 elsewhere. Shapes are brighter
than the background. Mirroring changes the class: set data.flip False.
"""

import threading

import numpy as np

from qbheat_jax.data import augment
from qbheat_jax.data.clip import Clip
from qbheat_jax.data.sources import base
from qbheat_jax.errors import UserError

SIZE, FRAMES = 48, 8
# Clockwise, as rows count downwards: class k moves in the direction k / 8 of a turn from the east.
CLASSES = ("east", "south-east", "south", "south-west", "west", "north-west", "north", "north-east")
QUIET, ROSE, FELL = 128, 255, 0

_SPLITS = {"train": 1.0, "val": 1 / 4, "test": 1 / 4}
# Part of the data set: other numbers give another data set.
_SEED = 2504_05830
_COUNT = 12  # shapes of a clip
_CORNERS = (0, 3, 4)  # of a disc, a triangle and a square
_FINE = 2  # shapes move by whole fine pixels, of which there are this many a pixel and side
_TURN = np.pi / 24  # most by which a direction deviates from its class's
# Pixels a frame, and pixels. Shapes are small and fast, so that the place that they leave is beside the one where they arrive.
_SPEEDS, _RADII = (2.5, 4.0), (3.0, 5.0)
# Grey levels of the background, how much brighter the shapes are, and by how much a channel deviates.
_DARK, _CONTRAST, _TINT = (30.0, 110.0), (70.0, 140.0), 15.0
_THRESHOLD, _FALSE_EVENTS, _NOISE = 0.15, 0.002, 2.0


class Shapes(base.ArraySource):
    """`shapes` or `shapes:N`: N (default 512) training clips, and N / 4 each for val and test."""

    clips = True
    plain = True

    def __init__(self, spec="shapes"):
        _, colon, count = spec.partition(":")
        if colon and not (count.isdecimal() and int(count) >= 8):
            raise UserError(f"data.source='{spec}' is not accepted: it takes 'shapes' or 'shapes:N' with N >= 8 clips")
        n = int(count) if colon else 512
        super().__init__(spec, {split: int(n * share) for split, share in _SPLITS.items()}, list(CLASSES))
        self._made, self._lock = {}, threading.Lock()

    def labels(self, split):
        return base.as_labels(np.arange(self.splits[self.split(split)]) % len(CLASSES))

    def images(self, split):
        """Return the middle RGB frames of a split, uint8 [n, 48, 48, 3]."""
        return np.stack([self._frames(split, index)[0][FRAMES // 2] for index in range(self.splits[self.split(split)])])

    def clip(self, split, index):
        split = self.split(split)

        def read(numbers):
            rgb, events = self._frames(split, index)
            return [(rgb[number], events[number]) for number in numbers]

        return Clip(FRAMES, index % len(CLASSES), f"{self.spec} {split}[{index}]", read)

    def fetch(self, split, index):
        clip = self.clip(split, index)
        return clip.read([FRAMES // 2])[0][0], clip.label, clip.name

    def _frames(self, split, index):
        """Return `frames` of an example, made on first use and then kept."""
        key = self.split(split), index
        with self._lock:
            if key not in self._made:
                self._made[key] = frames(*key)
            return self._made[key]


def frames(split, index):
    """Return clip `index` of a split: (RGB uint8 [8, 48, 48, 3], events uint8 [8, 48, 48, 1]).

    It does not depend on the number of clips.
    """
    generator = augment.rng(_SEED, list(_SPLITS).index(split), index, "shapes")
    angle = 2 * np.pi * (index % len(CLASSES)) / len(CLASSES) + generator.uniform(-_TURN, _TURN)
    step = generator.uniform(*_SPEEDS) * np.array([np.sin(angle), np.cos(angle)])
    shade, slope = generator.uniform(*_DARK), generator.uniform(-0.5, 0.5, 2)
    rows, columns = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    ground = (shade + slope[0] * rows + slope[1] * columns)[..., None] + generator.uniform(-_TINT, _TINT, 3)

    layer = _layer(generator, shade)
    # One more frame before the first, which its events are the difference to.
    shifts = np.rint(_FINE * step * np.arange(-1, FRAMES)[:, None]).astype(int)
    moved = np.stack([np.roll(layer, shift, (0, 1)) for shift in shifts])
    parts = [moved[:, i::_FINE, j::_FINE] for i in range(_FINE) for j in range(_FINE)]
    moved = sum(parts) / len(parts)
    scene = np.clip(moved[..., :3] + (1 - moved[..., 3:]) * ground, 0, 255)

    change = np.diff(np.log(scene.mean(-1, keepdims=True) + 10.0), axis=0)
    events = np.select([change > _THRESHOLD, change < -_THRESHOLD], [ROSE, FELL], QUIET)
    false = generator.random(events.shape) < _FALSE_EVENTS
    events = np.where(false, generator.choice([ROSE, FELL], events.shape), events)
    rgb = np.clip(scene[1:] + generator.normal(0, _NOISE, scene[1:].shape), 0, 255).round()
    return rgb.astype(np.uint8), events.astype(np.uint8)


def _layer(generator, shade):
    """Return the shapes of a clip on a plane that wraps around, in fine pixels: float [96, 96, 4].

    The channels are the colour, 0 where there is no shape, and whether there is one.
    """
    side = _FINE * SIZE
    layer = np.zeros((side, side, 4))
    for _ in range(_COUNT):
        corners, radius = _CORNERS[int(generator.integers(len(_CORNERS)))], _FINE * generator.uniform(*_RADII)
        centre, turn = generator.integers(0, side, 2), generator.uniform(0, 2 * np.pi)
        down, right = (np.arange(side) - centre[:, None] + side // 2) % side - side // 2
        if corners:
            angles = turn + 2 * np.pi * np.arange(corners)[:, None] / corners
            edges = (np.sin(angles) * down)[:, :, None] + (np.cos(angles) * right)[:, None]
            inside = (edges < radius * np.cos(np.pi / corners)).all(0)
        else:
            inside = (down**2)[:, None] + right**2 < radius**2
        colour = shade + generator.uniform(*_CONTRAST) + generator.uniform(-_TINT, _TINT, 3)
        layer[inside] = (*colour.clip(0, 255), 1)
    return layer
