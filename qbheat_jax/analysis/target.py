"""What is analysed: an encoder with its weights, its heat operator where it has one, and images by role."""

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

# Shares of the images where a source does not have the three splits, by how many it has.
_SHARES = {1: (0.5, 0.25, 0.25), 2: (0.8, 0.2)}


@dataclasses.dataclass(frozen=True)
class AnalysisTarget:
    """`frozen`: a `probe.encoders.FrozenEncoder`; `batch_size`: images encoded at once."""

    frozen: Any
    batch_size: int

    @property
    def heat(self):
        """(params, Heat) of the learnt operator, or None."""
        model = self.frozen.model
        if model is None or not isinstance(model.objective, QBHeat):
            return None
        return model.variables["params"]["decoder"]["heat"], model.objective.decoder.heat

    @property
    def quarters_encode(self):
        """Whether quarters can be encoded by the weights that encode whole images: a learnt position code cannot."""
        model = self.frozen.model
        return model is None or model.encoder.image_size is None

    def untrained(self, seed):
        """The same encoder with random weights, and no operator."""
        variables = encoders.untrained(self.frozen.encoder, self.frozen.image_size, seed)
        return AnalysisTarget(dataclasses.replace(self.frozen, variables=variables, model=None), self.batch_size)

    def maps(self, images):
        """uint8 [N, S, S, 3] -> float32 [N, h, w, C]."""
        parts = slices(images, self.batch_size)
        encode = functools.partial(_encode, self.frozen.features, self.frozen.variables)
        return np.concatenate([np.asarray(encode(part))[mask] for part, mask in parts])

    def quarter_maps(self, images, quarter):
        """Maps of the visible quarters alone: uint8 [N, S, S, 3] -> float32 [N, h/2, w/2, C]."""
        return self.maps(np.asarray(crop_visible(images, np.full(len(images), quarter, np.int32))))

    def carried(self, maps, direction, cells):
        """Cells of maps [N, h, w, C] carried `cells` cells in a direction by the learnt operator."""
        params, choice = self.heat
        half = maps.shape[1 if direction[0] == "y" else 2] // 2
        return _flat(lambda z: _carry(params, choice, z, direction, cells, half), maps)

    def continued(self, visible, quarter):
        """The grid that the learnt operator makes of visible maps: [N, h/2, w/2, C] -> [N, h, w, C]."""
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
    """Return the `AnalysisTarget` of --init, a directory or `random`. `config`: as of `analysis.fields.ANALYSE`."""
    return AnalysisTarget(encoders.open_init(init, config, (RANDOM,)), config.batch_size)


def roles(source, count, seed):
    """Which images fit, choose and test: {"train", "val", "test": (split, rows, sorted)}, drawn by the seed.

    At most `count` to fit on and half as many for each of the others. A source without all three splits is divided: what
    is tested on is never fitted on. Raises UserError where there are too few.
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
    """(images uint8 [n, S, S, 3], labels int32 [n]) of some rows of a split; what cannot be read is left out.

    A source that gives any index is read without tensorflow. Raises UserError where too many cannot be read.
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
    """(placements whose quarters are continued, why there are none): those the run trained on, else corners and centre."""
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
    except UserError as error:  # the images are not of the size that it was trained on
        return (), str(error)
    return trained, ""
