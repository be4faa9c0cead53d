"""Data spec of clips: some frames of every clip, RGB and events, all of them cropped and mirrored alike."""

import functools
from dataclasses import dataclass, replace

import numpy as np

from qbheat_jax.config import POSITIVE, Field, refuse
from qbheat_jax.data import augment
from qbheat_jax.data.clip import MODALITIES
from qbheat_jax.data.specs.image import FIELDS as _IMAGE
from qbheat_jax.data.specs.image import ImageSpec, empty

_SIDES = (lambda v: len(v) > 0 and all(0 < x <= 1 for x in v), "one or more numbers above 0, at most 1")

# Fields of clips alone.
OWN = {
    "data.frames": Field(8, "clips: frames of each clip, one of each of this many segments of equal length", POSITIVE),
    "data.clip_scales": Field(
        (1.0, 0.875, 0.75, 0.66),
        "clips: sides of the training crops over the shorter side; width and height are neighbours in this list",
        _SIDES,
    ),
}
FIELDS = {**OWN, "data.flip": _IMAGE["data.flip"]}


@dataclass(frozen=True)
class ClipsSpec(ImageSpec):
    """Frames of a source of clips. A batch has image uint8 [B, 2, T, S, S, 3]; the second axis is (RGB, event).

    A clip is cut into `frames` segments of equal length. Training takes a random frame of each segment, evaluation the middle
    one, and both modalities the same ones. The box of a training crop has sides from `scales` times the shorter side, and one
    of 13 positions (TSN, arXiv 1608.00859). Evaluation is that of `ImageSpec`. Box, mirroring and quarter hold for all
    frames of a clip.
    """

    frames: int = 8
    scales: tuple = (1.0,)

    annotation = "clip"
    cacheable = False

    @classmethod
    def of(cls, config, placements=(0,)):
        """Return the spec of a training config with `data.frames` and `data.clip_scales`."""
        given = config.data
        if given.get("device_cache"):
            refuse("data.device_cache", True, f"False with encoder.name={config.encoder.name!r}: clips are not cached")
        shown = {"flip": given.flip, "frames": given.frames, "scales": tuple(given.clip_scales)}
        return cls(config.image_size, config.seed, placements, True, **shown)

    def augmented(self, shown, seed):
        return replace(self, seed=seed, train=True, scales=tuple(shown.clip_scales), flip=shown.flip)

    def fetch(self, source, split, index):
        """Return (`Clip`, label, name) of an example. Nothing is read yet."""
        clip = source.clip(split, index)
        return clip, clip.label, clip.name

    def empty(self, count):
        shape, size = (count, len(MODALITIES), self.frames), self.image_size
        grey = empty(int(np.prod(shape)), {"image": size})["image"]
        return {**super().empty(count), "image": grey.reshape(*shape, size, size, 3)}

    def numbers(self, epoch, index, count):
        """Return the numbers of an example's frames, int64 [T], of a clip of `count` frames."""
        middle = np.full(self.frames, 0.5)
        draws = augment.rng(self.seed, epoch, index, "frames").random(self.frames) if self.train else middle
        return augment.one_of_each_segment(count, draws)

    def box(self, epoch, index, height, width, view=0):
        if not self.train:
            return super().box(epoch, index, height, width, view)
        generator = augment.rng(self.seed, epoch, index, augment.of_view("crop", view))
        return augment.multi_scale_box(generator, height, width, self.scales)

    def prepare(self, out, k, data, label, epoch, index, jpeg_window=None):
        """As `ImageSpec.prepare`; `data` is a `Clip`. Frames are decoded whole."""
        out["label"][k] = label
        return functools.partial(self._put, out, k, data, epoch, index)

    def _put(self, out, k, clip, epoch, index):
        frames = clip.decode(self.numbers(epoch, index, clip.count).tolist())
        box, mirrored = self.box(epoch, index, *frames[0][0].shape[:2]), bool(self.mirrored(epoch, index))
        for t, pair in enumerate(frames):
            for modality, frame in enumerate(pair):
                out["image"][k, modality, t] = augment.crop_resize(frame, box, self.image_size, mirrored)
        out["mask"][k] = True
