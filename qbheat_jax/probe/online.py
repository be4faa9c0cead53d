"""Online monitors and probes: one pass over a fixed sample of the training images, while an encoder trains.

The sample gives the label-free monitors (`eval.monitors`). Where its images have labels, it also gives the accuracy of k-NN
and of a linear classifier, each by cross-validation within the sample. No other split is read, so test labels play no part.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from qbheat_jax import device_mesh, rng
from qbheat_jax.data import device_cache
from qbheat_jax.data.sources.synthetic import Synthetic
from qbheat_jax.eval import monitors
from qbheat_jax.eval.evaluate import Evaluator, Metric
from qbheat_jax.methods.common import encoding
from qbheat_jax.ops import resample
from qbheat_jax.probe import fit, knn
from qbheat_jax.probe.features import Features, standard
from qbheat_jax.probe.splits import Subset

# The split's name, and so the prefix of the figures: "online/rankme".
SPLIT = "online"

# Most bytes of images that stay in memory between evaluations.
_KEPT = 1 << 28

# Parts of cross-validation: each is measured by what was learnt from the others.
FOLDS = 4
NEIGHBOURS, TEMPERATURE = 20, 0.07
# Of the linear classifier's ridge, relative to the variance of a feature.
STRENGTH = 0.1


class Online(Metric):
    """The monitors, and the accuracies of the online probes, over the images of one small split.

    Row k of a batch also shows view k % views of the image in row k - k % views, so LiDAR costs as much as everything else.
    Its batches must therefore have a multiple of `views` rows.
    """

    name, headline = "the monitors", "rankme"
    inputs = ("image", "label", "mask", "index")

    def __init__(self, features, settings, shown, seed, views):
        """Prepare the metric.

        Args:
          features: Function of (variables, images uint8 [B, S, S, 3]) to maps [B, h, w, C].
          settings: Section `monitors` of a config.
          shown: Its section `data`, for the crops of the views.
          seed: Root of the views' random draws.
          views: Of each image that LiDAR sees; 0: no LiDAR.
        """
        self._features, self._views = features, views
        self._probes = settings.get("probes", "").split(",")
        self._scale, self._ratio = shown.crop_scale, shown.crop_ratio
        self._flip, self._key = shown.flip, rng.fold(rng.root(seed), SPLIT)

    def sums(self, variables, batch):
        """Return {"n", "label", "mask", "features": float32 [B, C]}, and "views": float32 [B, C] where there are views."""
        images, count = batch["image"], len(batch["image"])
        found = {"n": batch["mask"].sum(), "label": batch["label"], "mask": batch["mask"]}
        if not self._views:
            return {**found, "features": self._pooled(variables, images)}
        # Side by side, so that no device needs the rows of another, and the encoder is compiled once.
        shown = jnp.stack([images, self._crops(images, batch["index"])], 1)
        both = self._pooled(variables, shown.reshape(2 * count, *images.shape[1:])).reshape(count, 2, -1)
        return {**found, "features": both[:, 0], "views": both[:, 1]}

    def _pooled(self, variables, images):
        return self._features(variables, images).astype(jnp.float32).mean((1, 2))

    def _crops(self, images, index):
        """Return the views uint8 [B, S, S, 3] of a batch. Their draws depend on the example and the view alone."""
        source, size = jnp.repeat(index[:: self._views], self._views), images.shape[1]
        view = jnp.arange(len(images)) % self._views
        keys = jax.vmap(lambda i, v: jax.random.fold_in(jax.random.fold_in(self._key, i), v))(source, view)
        draws = jax.vmap(lambda key: jax.random.uniform(key, (5,)))(keys)
        boxes = crop_boxes(draws, size, self._scale, self._ratio)
        shown = jnp.repeat(images[:: self._views], self._views, 0)
        return resample.crop_resize(shown, boxes, size, (draws[:, 4] < 0.5) & self._flip)

    def add(self, total, sums):
        return [*(total or ()), sums]

    def figures(self, total):
        parts = {name: np.concatenate([part[name] for part in total]) for name in total[0] if name != "n"}
        mask, labels = parts["mask"], parts["label"][parts["mask"]]
        features = parts["features"][mask]
        figures = {"rankme": monitors.rankme(features), "alpha_req": monitors.alpha_req(features)}
        if self._views:
            views = parts["views"].reshape(-1, self._views, features.shape[1])
            figures["lidar"] = monitors.lidar(views[mask[:: self._views]])
        return {**figures, **accuracies(features, labels, self._probes)}, {}


def crop_boxes(draws, size, scale, ratio):
    """Return random boxes float32 [B, 4], (top, left, height, width), in square images of `size` pixels.

    Args:
      draws: Uniform float32 [B, 4 or more]: area, aspect, and place down and right.
      size: Pixels a side.
      scale: (least, most) share of the area.
      ratio: (least, most) of width / height. A side that would exceed the image is cut to it.
    """
    area = size**2 * (scale[0] + (scale[1] - scale[0]) * draws[:, 0])
    aspect = jnp.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * draws[:, 1])
    height, width = (jnp.clip(jnp.round(jnp.sqrt(x)), 1, size) for x in (area / aspect, area * aspect))
    top, left = (jnp.floor(draws[:, k] * (size - side + 1)) for k, side in ((2, height), (3, width)))
    return jnp.stack([top, left, height, width], 1)


def accuracies(features, labels, probes):
    """Return {probe: top-1} of "knn" and "lin" by cross-validation; {} where there are not two classes.

    Args:
      features: float32 [N, C].
      labels: int [N], -1 for none.
      probes: Names.
    """
    measure = {"knn": _by_neighbours, "lin": _by_ridge}
    features, labels = features[labels >= 0], labels[labels >= 0]
    names, labels = np.unique(labels, return_inverse=True)
    if len(names) < 2 or len(labels) < 2 * FOLDS or not np.isfinite(features).all():
        return {}
    part, found = np.empty(len(labels), int), {}
    part[np.argsort(labels, kind="stable")] = np.arange(len(labels)) % FOLDS  # each class in all parts
    for name in filter(None, probes):
        right = 0
        for k in range(FOLDS):
            votes = measure[name](features[part != k], labels[part != k], features[part == k], len(names))
            right += (knn.ranks(votes, labels[part == k]) == 0).sum()
        found[name] = float(right / len(labels))
    return found


def _by_neighbours(bank, labels, queries, classes):
    count = min(NEIGHBOURS, len(bank))
    distance = 1.0 - knn.unit(queries) @ knn.unit(bank).T
    near = np.argsort(distance, 1, kind="stable")[:, :count]
    return knn.votes(np.take_along_axis(distance, near, 1), labels[near], count, TEMPERATURE, classes)


def _by_ridge(bank, labels, queries, classes):
    mean, scale = standard([bank])
    head = fit.ridge(Features.of((bank - mean) * scale, labels), classes, (STRENGTH,))["classifier"]
    scores = (queries - mean) * scale @ head["kernel"][0] + head["bias"][0]
    return scores - scores.min(1, keepdims=True) + 1.0  # `knn.ranks` takes a class without votes for a wrong one


def sample(source, split, count, seed):
    """Return a source with the split SPLIT: at most `count` images, drawn by the seed, or the first of a stream."""
    examples = source.splits[source.split(split)]
    count = min(count, examples)
    if isinstance(source, Synthetic):  # itself, since any other source is read by tensorflow
        first = Synthetic(source.spec, source.image_size)
        first.splits = {SPLIT: count}
        return first
    rows = np.arange(count)
    if source.random_access:
        rows = np.sort(np.random.default_rng((seed, examples)).permutation(examples)[:count])
    return Subset(source, {SPLIT: [(source.split(split), rows)]})


def batch_size(examples, views, devices):
    """Return the rows of a batch that also shows as many views: about half of `examples`, a multiple of both numbers."""
    step = math.lcm(max(views, 1), devices)
    return max(1, round(examples / (2 if views else 1) / step)) * step


def of_run(config, objective, source):
    """Return the `Evaluator` of a pre-training run, or None where `monitors.images` is 0.

    Unreadable images never end a run.
    """
    settings = config.monitors
    if not settings.images:
        return None
    views = 0 if objective.encoder.takes_clips else settings.views
    mesh, kept = device_mesh.make_mesh(config.mesh), settings.images * 3 * config.image_size**2 <= _KEPT
    shown = sample(source, config.data.split, settings.images, config.seed)

    def features(variables, images):
        known = encoding.variables(variables["params"], variables["batch_stats"])
        return objective.encoder.apply(known, objective.pixels.normalise(images))[0]

    return Evaluator.of_run(
        Online(features, settings, config.data, config.seed, views),
        shown, SPLIT, config, max_bad_fraction=1.0, keep=kept,
        batch_size=batch_size(config.batch_size, views, mesh.shape["data"] * mesh.shape["fsdp"]),
    )  # fmt: skip


def of_encoder(config, frozen, source, split):
    """Return {"rankme", "alpha_req", "lidar"} of a `FrozenEncoder` on a sample of a split, for a probe's config."""
    clips = len(frozen.spec.shapes(1)["image"].shape) > 4
    views = 0 if clips else config.monitors.views
    mesh, shown = device_mesh.make_mesh({"data": -1}), config.data
    sampled = sample(source, split, config.monitors.images, config.seed)
    evaluate = Evaluator(
        Online(frozen.features, config.monitors, shown, config.seed, views),
        sampled, SPLIT, mesh, frozen.spec,
        batch_size=batch_size(config.batch_size, views, mesh.shape["data"]),
        cache=device_cache.of(shown, frozen.image_size, sampled, SPLIT, mesh) if frozen.spec.cacheable else None,
        workers=shown.workers, prefetch=shown.prefetch,
    )  # fmt: skip
    evaluate(frozen.variables)
    return evaluate.measured.figures
