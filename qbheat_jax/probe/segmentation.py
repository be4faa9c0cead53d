"""Segmentation of frozen feature maps: a linear classifier of every cell, or the votes of the nearest training cells.

Both give every cell scores of the classes. Scores are scaled up bilinearly to the mask, and the best class of a pixel is its
prediction. The classifier learns the share of each class among a cell's pixels, so that no map is scaled up in training. The
neighbours' labels are the commonest class of their cell (as Hummingbird, arXiv 2306.01667, with a bounded bank).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qbheat_jax.data.specs.masks import IGNORED
from qbheat_jax.errors import UserError
from qbheat_jax.eval import miou
from qbheat_jax.probe import fit, knn
from qbheat_jax.probe.features import slices
from qbheat_jax.probe.pmap import pmap, pmap_batches

# Cells at once that ask for their neighbours.
_QUERIES = 1024


@dataclasses.dataclass(frozen=True)
class CellRecipe(fit.Recipe):
    """A `fit.Recipe` of heads that classify cells. Labels are counts of `cell_counts`; every pixel weighs the same."""

    def target(self, labels):
        counts = labels.astype(jnp.float32)
        total = counts.sum(-1)
        return optax.smooth_labels(counts / jnp.maximum(total, 1.0)[..., None], self.label_smoothing), total


class Heads:
    """`seg-lin`: the classifier of a grid that has the best mean IoU on held-out images; `refit` trains it on all images.

    Attributes:
      holdout: its mean IoU on held-out images.
      hparams: what was chosen.
      curve: metric lines.
    """

    def __init__(self, recipe, config, examples):
        def score(params):
            found = _count(_predicted(recipe, params, examples.holdout), examples.holdout.labels, recipe.classes)
            return np.array([_mean_iou(pairs) for pairs in found])

        train = _of_cells(examples.train, recipe.classes)
        (rate, decay), chosen, self.holdout, self.curve = fit.choose(
            recipe, train, config.seed, score, miou.QUOTED[0], always=False
        )
        self.hparams = {"optimizer": config.optimizer, "weight_decay": decay}
        self.hparams |= {"learning_rate": rate, "epochs": config.total_epochs}
        self._recipe = dataclasses.replace(recipe, learning_rates=(rate,), weight_decays=(decay,))
        both = _of_cells(examples.both, recipe.classes) if config.refit else None
        self._params = fit.fit(self._recipe, both, config.seed) if config.refit else chosen

    def predict(self, features):
        """Yield predictions uint8 [n, 1, S, S] of `Features` of maps, whose labels are masks of S pixels a side."""
        return _predicted(self._recipe, self._params, features)


class Neighbours:
    """`seg-knn`: the number of neighbours and the temperature with the best mean IoU on held-out images. See `Heads`."""

    curve = ()

    def __init__(self, classes, config, examples):
        self._classes, self._batch_size = classes, config.batch_size
        bank = _bank(examples.train, classes, config)
        counts = [int(k) for k in config.knn.neighbours if k <= len(bank)]
        if not counts:
            raise UserError(
                f"config field knn.neighbours={config.knn.neighbours} is not accepted: there are {len(bank)} training cells"
            )
        found = knn.find(bank, _cells(examples.holdout), max(counts), _QUERIES)
        scores = {}
        for k in counts:
            for temperature in config.knn.temperatures:
                predicted = self._voted(examples.holdout, *found, k, temperature)
                (pairs,) = _count(predicted, examples.holdout.labels, classes)
                scores[k, temperature] = _mean_iou(pairs)
        self._chosen, self.holdout = max(scores.items(), key=lambda item: item[1])
        self.hparams = dict(zip(("neighbours", "temperature"), self._chosen))
        self._bank = _bank(examples.both, classes, config) if config.refit else bank
        self.hparams["bank"] = len(self._bank)

    def predict(self, features):
        """As `Heads.predict`."""
        found = knn.find(self._bank, _cells(features), self._chosen[0], _QUERIES)
        return self._voted(features, *found, *self._chosen)

    def _voted(self, features, distance, labels, k, temperature):
        height, width = features.shape[:2]

        def maps():
            step = self._batch_size * height * width
            for begin in range(0, len(distance), step):
                part = slice(begin, begin + step)
                votes = knn.votes(distance[part], labels[part], k, temperature, self._classes)
                votes = votes.reshape(-1, 1, height, width, self._classes).astype(np.float32)
                yield from slices(votes, self._batch_size)

        return pmap_batches(_scaled(features.labels.shape[1], tuple(jax.local_devices())), {}, maps())


def measure(method, features, names):
    """Return the `miou.figures` of a method, `Heads` or `Neighbours`, on `Features` with masks. names: of the classes."""
    (pairs,) = _count(method.predict(features), features.labels, len(names))
    return miou.figures(pairs, names)


def constant(train, tested, names):
    """Return {"class", "mIoU", "pixel_accuracy"} of naming the commonest class of `train` for every pixel of `tested`.

    train, tested: masks uint8 [N, S, S].
    """
    common = int(_frequencies(train, len(names)).argmax())
    figures = miou.figures(miou.constant(_frequencies(tested, len(names)), common), names)
    return {"class": names[common], **{name: figures[name] for name in miou.QUOTED}}


def cell_counts(masks, height, width, classes):
    """Return the pixels of each class in each cell, uint16 [N, height, width, classes], of masks uint8 [N, S, S]."""
    size = masks.shape[1]
    rows, columns = (np.arange(size) * cells // size for cells in (height, width))
    cell = (rows[:, None] * width + columns) * (IGNORED + 1)
    counts = np.empty((len(masks), height * width, classes), np.uint16)
    for n, mask in enumerate(masks):
        each = np.bincount((cell + mask).ravel(), minlength=height * width * (IGNORED + 1))
        counts[n] = each.reshape(height * width, -1)[:, :classes]
    return counts.reshape(-1, height, width, classes)


def _frequencies(masks, classes):
    """Return the pixels of each class, int64 [classes], of masks uint8 [N, S, S]."""
    return sum(np.bincount(mask.ravel(), minlength=IGNORED + 1)[:classes] for mask in masks)


def _mean_iou(pairs):
    """Return the mean IoU of counts, or 0 where no pixel counts, so that choices can be compared."""
    return miou.figures(pairs, range(len(pairs)))["mIoU"] or 0.0


def _of_cells(features, classes):
    """Return Features of maps with `cell_counts` in place of their masks."""
    return dataclasses.replace(features, labels=cell_counts(features.labels, *features.shape[:2], classes))


def _cells(features, labels=None):
    """Return Features of single cells, image by image. labels: int [cells]; without any they are 0."""
    each = int(np.prod(features.shape[:2]))
    parts = tuple(part.reshape(-1, part.shape[-1]) for part in features.parts)
    rows = (features.rows[:, None] * each + np.arange(each)).ravel()
    labels = np.zeros(len(rows), np.int32) if labels is None else labels.astype(np.int32)
    return dataclasses.replace(features, parts=parts, rows=rows, labels=labels)


def _bank(features, classes, config):
    """Return Features of the cells that may be neighbours, at most knn.bank, with their commonest class."""
    counts = cell_counts(features.labels, *features.shape[:2], classes).reshape(-1, classes)
    known = np.flatnonzero(counts.any(-1))
    if len(known) > config.knn.bank:
        known = np.sort(np.random.default_rng(config.seed).choice(known, config.knn.bank, replace=False))
    return _cells(features, counts.argmax(-1)).subset(known)


def _count(predicted, masks, classes):
    """Return the counts of `miou.pairs`, int64 [G, classes, classes + 1], of predictions uint8 [n, G, S, S] in parts."""
    total, begin = 0, 0
    for found in predicted:
        truth = masks[begin : begin + len(found)]
        total = total + np.stack([miou.pairs(truth, found[:, g], classes) for g in range(found.shape[1])])
        begin += len(found)
    return total


def _predicted(recipe, params, features):
    """Yield predictions uint8 [n, G, S, S] of heads with params [G, ...] on Features of maps."""
    size = recipe.batch_size
    mapped = _predictor(recipe.head, features.labels.shape[1], tuple(jax.local_devices()))
    batches = (batch for _, x in features.blocks(size) for batch in slices(x, size))
    return pmap_batches(mapped, params, batches)


@functools.lru_cache(maxsize=8)
def _predictor(head, size, devices):
    """Return the pmapped (params [G, ...], x [B, h, w, C]) -> predictions uint8 [B, G, size, size]."""
    del devices  # part of the cache's key: a pmapped function belongs to its devices

    def predict(params, x):
        scores = jax.vmap(lambda p: head.apply({"params": p}, x), out_axes=1)(params)
        return best_classes(scores, size)

    return pmap(predict)


@functools.lru_cache(maxsize=8)
def _scaled(size, devices):
    """Return the pmapped ({}, scores [B, G, h, w, classes]) -> predictions uint8 [B, G, size, size]."""
    del devices
    return pmap(lambda _, scores: best_classes(scores, size))


def best_classes(scores, size):
    """Return the class of the best score of every pixel, scores scaled up bilinearly; IGNORED in maps with NaN.

    scores: float [B, G, h, w, classes] -> uint8 [B, G, size, size]. One map after the other, to bound the memory.
    """

    def one(scores):
        large = jax.image.resize(scores, (size, size, scores.shape[-1]), "bilinear")
        return jnp.where(jnp.isnan(scores).any(), IGNORED, large.argmax(-1)).astype(jnp.uint8)

    maps = jax.lax.map(one, scores.reshape(-1, *scores.shape[2:]))
    return maps.reshape(*scores.shape[:2], size, size)
