"""The `shapes` source: clips of a moving shape and the event frames that a camera would record. It works offline.

The class is the direction of motion, one of eight. Nothing else depends on it: shape, size, colour, speed and background are
drawn for each clip, and the shape leaves the image on one side and comes back on the other. A single RGB frame therefore
shows nothing of the class. An event frame shows where the logarithm of brightness has changed by more than a threshold since
the frame before: 255 where it rose, 0 where it fell, 128 elsewhere. Mirroring changes the class: set data.flip False.
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
_TURN = np.pi / 24  # most by which a direction deviates from its class's
_SPEEDS, _RADII = (1.5, 3.0), (5.0, 9.0)  # pixels a frame, pixels
_DARK, _CONTRAST = (30.0, 110.0), (70.0, 140.0)  # grey levels of the background; how much brighter the shape is
_THRESHOLD, _FALSE_EVENTS, _NOISE = 0.15, 0.004, 2.0
_CORNERS = {"disc": 0, "triangle": 3, "square": 4}


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
    corners = list(_CORNERS.values())[int(generator.integers(len(_CORNERS)))]
    radius, turn = generator.uniform(*_RADII), generator.uniform(0, 2 * np.pi)
    # One more frame before the first, which its events are the difference to.
    centres = generator.uniform(0, SIZE, 2) + step * np.arange(-1, FRAMES)[:, None]
    cover = _cover(centres, radius, corners, turn)[..., None]

    shade = generator.uniform(*_DARK)
    slope = generator.uniform(-0.5, 0.5, 2)
    rows, columns = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    tints = generator.uniform(-15, 15, (2, 3))
    ground = (shade + slope[0] * rows + slope[1] * columns)[..., None] + tints[0]
    colour = shade + generator.uniform(*_CONTRAST) + tints[1]
    scene = np.clip(ground + cover * (colour - ground), 0, 255)

    change = np.diff(np.log(scene.mean(-1, keepdims=True) + 10.0), axis=0)
    events = np.select([change > _THRESHOLD, change < -_THRESHOLD], [ROSE, FELL], QUIET)
    false = generator.random(events.shape) < _FALSE_EVENTS
    events = np.where(false, generator.choice([ROSE, FELL], events.shape), events)
    rgb = np.clip(scene[1:] + generator.normal(0, _NOISE, scene[1:].shape), 0, 255).round()
    return rgb.astype(np.uint8), events.astype(np.uint8)


def _cover(centres, radius, corners, turn):
    """Return the share of each pixel that a shape covers, float [n, 48, 48], on a plane that wraps around.

    Args:
      centres: float [n, 2], rows and columns.
      radius: of the disc, or of the circle around the polygon's corners.
      corners: number of corners of a regular polygon; 0 for a disc.
      turn: angle of the polygon.
    """
    offsets = np.stack(np.mgrid[:SIZE, :SIZE], -1) - centres[:, None, None]
    offsets = (offsets + SIZE / 2) % SIZE - SIZE / 2
    if not corners:
        outside = np.hypot(offsets[..., 0], offsets[..., 1]) - radius
    else:
        angles = turn + 2 * np.pi * np.arange(corners) / corners
        sides = offsets @ np.stack([np.sin(angles), np.cos(angles)])
        outside = sides.max(-1) - radius * np.cos(np.pi / corners)
    return np.clip(0.5 - outside, 0, 1)
