"""The target of an analysis: an encoder with weights, its heat operator if it has one, and images to fit and test on."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qbheat_jax import data
from qbheat_jax.data.specs import image
from qbheat_jax.errors import UserError
from qbheat_jax.methods.qbheat import QBHeat, crop_visible
from qbheat_jax.ops import heat, quarters
from qbheat_jax.pretrained import RANDOM
from qbheat_jax.probe import encoders, splits
from qbheat_jax.probe.features import slices

# Fractions of a split for (train, val, test), or for (train, val) if the source has another split to test on.
_SHARES = {1: (0.5, 0.25, 0.25), 2: (0.8, 0.2)}


@dataclasses.dataclass(frozen=True)
class AnalysisTarget:
    """An encoder and its heat operator, as functions of numpy arrays.

    Attributes:
      frozen: `probe.encoders.FrozenEncoder`.
      batch_size: images encoded at once.
    """

    frozen: Any
    batch_size: int

    @property
    def heat(self):
        """(params, Heat) of the learnt heat operator; None if the encoder was not trained by QB-Heat."""
        model = self.frozen.model
        if model is None or not isinstance(model.objective, QBHeat):
            return None
        return model.variables["params"]["decoder"]["heat"], model.objective.decoder.heat

    @property
    def quarters_encode(self):
        """Whether the encoder takes quarters as well as whole images. A learnt position code takes one size only."""
        model = self.frozen.model
        return model is None or not model.encoder.one_size

    def untrained(self, seed):
        """Return the AnalysisTarget of the same encoder with random weights and without a heat operator."""
        variables = encoders.untrained(self.frozen.encoder, self.frozen.image_size, seed)
        return AnalysisTarget(dataclasses.replace(self.frozen, variables=variables, model=None), self.batch_size)

    def maps(self, images):
        """Return the features of images uint8 [N, S, S, 3] as float32 [N, h, w, C]."""
        parts = slices(images, self.batch_size)
        encode = functools.partial(_encode, self.frozen.features, self.frozen.variables)
        return np.concatenate([np.asarray(encode(part))[mask] for part, mask in parts])

    def quarter_maps(self, images, quarter):
        """Return the features of the visible quarters alone: uint8 [N, S, S, 3] -> float32 [N, h/2, w/2, C].

        quarter: index of the placement, 0 to 8.
        """
        return self.maps(np.asarray(crop_visible(images, np.full(len(images), quarter, np.int32))))

    def carried(self, maps, direction, cells):
        """Return maps [N, h, w, C] with every cell propagated by the learnt operator over a distance of `cells` cells.

        direction: "x+", "x-", "y+" or "y-".
        """
        params, choice = self.heat
        half = maps.shape[1 if direction[0] == "y" else 2] // 2
        return _flat(lambda z: _carry(params, choice, z, direction, cells, half), maps)

    def continued(self, visible, quarter):
        """Return the full grid that the learnt operator extrapolates from visible features.

        Args:
          visible: float32 [N, h/2, w/2, C].
          quarter: index of the placement, 0 to 8.

        Returns:
          float32 [N, h, w, C].
        """
        params, choice = self.heat
        parts = slices(visible, self.batch_size)
        return np.concatenate([np.asarray(_extrapolate(params, choice, part, quarter))[mask] for part, mask in parts])


@functools.partial(jax.jit, static_argnums=0)
def _encode(features, variables, images):
    return features(variables, images)


@functools.partial(jax.jit, static_argnums=(1, 3, 4, 5))
def _carry(params, choice, z, direction, cells, half):
    distance = cells / half if direction[1] == "+" else -cells / half
    return heat.carry(params, choice, z, direction[0], distance, half)


@functools.partial(jax.jit, static_argnums=(1, 3))
def _extrapolate(params, choice, visible, quarter):
    placed = jnp.full(visible.shape[:1], quarter, jnp.int32)
    return heat.extrapolate(params, choice, visible, placed, (quarter,))


def _flat(function, maps):
    return np.asarray(function(maps.reshape(-1, maps.shape[-1]))).reshape(maps.shape)


def open_target(init, config):
    """Return the `AnalysisTarget` of --init, a directory or `random`. `config` has the fields of `ANALYSE`."""
    frozen = encoders.open_init(init, config, (RANDOM,))
    if frozen.encoder.takes_clips:
        raise UserError(f"--init {init} is not accepted: it has an encoder of clips, and analyse takes one of images")
    return AnalysisTarget(frozen, config.batch_size)


def roles(source, count, seed):
    """Draw the images to fit on (train), to choose on (val) and to test on.

    If the source lacks one of these splits, its images are divided, so that no test image is fitted on.

    Args:
      source: a `data.sources.base.Source`.
      count: largest number of images to fit on; val and test get half as many each.
      seed: int that determines the draw.

    Returns:
      {"train", "val", "test": (split, rows int [n], sorted)}.

    Raises:
      UserError: a role has fewer than two images.
    """
    generator = np.random.default_rng(seed)
    order = {name: generator.permutation(n) for name, n in source.splits.items()}
    wanted = {"train": count, "val": max(2, count // 2), "test": max(2, count // 2)}
    if all(name in order for name in wanted):
        chosen = {name: (name, order[name]) for name in wanted}
    else:
        first = "train" if "train" in order else next(iter(order))
        others = [name for name in order if name != first]
        shares = _SHARES[2 if others else 1]
        ends = np.cumsum([round(share * len(order[first])) for share in shares])[:-1]
        parts = np.split(order[first], ends)
        chosen = dict(zip(("train", "val", "test"), [(first, part) for part in parts]))
        if others:
            chosen["test"] = (others[0], order[others[0]])
    chosen = {role: (split, np.sort(rows[: wanted[role]])) for role, (split, rows) in chosen.items()}
    short = next((role for role, (_, rows) in chosen.items() if len(rows) < 2), None)
    if short:
        have = ", ".join(f"{n} in {split}" for split, n in source.splits.items())
        raise UserError(f"data.source={source.spec!r} has {have}: too few to fit, to choose and to test on")
    return chosen


def read(source, split, rows, config, image_size):
    """Return (images uint8 [n, S, S, 3], labels int32 [n]) of the readable ones among the rows of a split.

    A random-access source is read without tensorflow.

    Raises:
      UserError: too many images are unreadable, or fewer than two are left.
    """
    bad, spec = data.BadFiles(config.data.max_bad_fraction, len(rows)), image.ImageSpec(image_size, config.seed)
    if source.random_access:
        batch = image.build(spec, lambda _, i: source.fetch(split, i), np.zeros_like(rows), rows, bad)
        bad.check()
        batches = [batch]
    else:
        batches = data.eval_batches(
            splits.Subset(source, {split: [(split, rows)]}), spec, split=split, batch_size=config.batch_size, bad=bad,
        )  # fmt: skip
    kept = [(batch["image"][batch["mask"]], batch["label"][batch["mask"]]) for batch in batches]
    images, labels = (np.concatenate(column) for column in zip(*kept))
    if len(images) < 2:
        raise UserError(f"data.source={source.spec!r} split {split!r} has hardly an image that can be read")
    return images, labels


def placements(subject, height, width):
    """Return (placements to extrapolate from, reason if there are none).

    They are those of training. Without a learnt operator they are the corners and, if the map allows it, the centre.

    Args:
      subject: AnalysisTarget.
      height, width: cells of the map of a whole image.
    """
    if height % 2 or width % 2:
        return (), f"a map of {height} x {width} cells has no quarter"
    if not subject.quarters_encode:
        return (), "its position code is learnt for one size of image"
    if subject.heat is None:
        name = "corners" if height % 4 or width % 4 else "corners_center"
        return quarters.PLACEMENT_SETS[name], ""
    trained = subject.frozen.model.objective.decoder.placements
    try:
        quarters.check_grid(height, width, trained)
    except UserError as error:  # these images have another size than those of training
        return (), str(error)
    return trained, ""
