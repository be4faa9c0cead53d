"""Which images a report shows: of distinct labels where there are labels, drawn by the run's seed."""

import dataclasses

import numpy as np

from qbheat_jax import data
from qbheat_jax.data.bad_files import BadFiles
from qbheat_jax.data.specs import image
from qbheat_jax.ops import quarters

# How many images the mean errors are taken over.
POOL = 64

# How much of a source that can only be read in order is looked through for distinct labels.
_BATCHES = 16

RULE = "The images were drawn at random, from as many classes as can be; those with the most contrast come first."


@dataclasses.dataclass(frozen=True)
class Sample:
    """Images of the evaluation split.

    images uint8[N, H, W, 3], the first ones of labels as distinct as can be; names: N words for them; split: where they
    are from; trained_on: whether that is the split trained on; sizes: {split: images} of the source, {} if not known;
    rule: a sentence on how they were chosen.
    """

    images: np.ndarray
    names: tuple
    split: str
    trained_on: bool = False
    sizes: dict = dataclasses.field(default_factory=dict)
    rule: str = ""


def count(placements):
    """How many images are shown one by one, the more placements the fewer, so that a phone is not scrolled for ever."""
    return 8 if placements < 3 else 6 if placements < 6 else 4


def draw(config):
    """Sample for a run's config, at most POOL images. Raises UserError where the source cannot be opened."""
    source = data.open_source(config.data.source, image_size=config.image_size, tfds_dir=config.data.tfds_dir)
    split = next((name for name in ("test", "val", "train") if name in source.splits), next(iter(source.splits)))
    batch = (_picked if source.random_access else _first)(source, split, config)
    batch = {key: values[batch["mask"]] for key, values in batch.items()}
    order = contrast_first(batch, distinct_first(batch["label"])[:POOL])
    names = [_name(source, split, batch["label"][i], batch["index"][i]) for i in order]
    trained_on = split == config.data.split
    return Sample(batch["image"][order], tuple(names), split, trained_on, dict(source.splits), RULE)


def distinct_first(labels):
    """int[n] -> order of the n: the first of each label, then the others, each part as it came.

    >>> distinct_first(np.array([3, 3, 1, 3, 1, 2])).tolist()
    [0, 2, 5, 1, 3, 4]
    """
    first = np.sort(np.unique(labels, return_index=True)[1])
    return np.concatenate([first, np.setdiff1d(np.arange(len(labels)), first)])


def contrast_first(batch, order):
    """The images that come first for their labels, those with the most contrast at the head.

    A blank wall can be continued by anyone: what has something in it shows more, and is the harder test. No
    prediction is looked at. batch: {"image" uint8 [n, H, W, 3], "label" int [n]}; order: as of `distinct_first`.
    """
    distinct = len(np.unique(batch["label"][order]))
    first = order[: distinct if distinct > 1 else len(order)]
    contrast = batch["image"][first].std((1, 2)).mean(1)
    return np.concatenate([first[np.argsort(-contrast, kind="stable")], order[len(first) :]])


def _picked(source, split, config):
    """POOL examples of a source that gives any index: no other image is read."""
    order = np.random.default_rng(config.seed).permutation(source.splits[split])
    labels = source.labels(split)
    if labels is not None:
        order = order[distinct_first(np.asarray(labels)[order])]
    indices = order[:POOL].astype(np.int64)
    spec = image.ImageSpec(config.image_size, config.seed, _placements(config), False)

    def fetch(_, index):
        return source.fetch(split, index)

    return image.build(spec, fetch, np.zeros_like(indices), indices, BadFiles(1.0, len(indices)))


def _first(source, split, config):
    """The first batches of a source that is read in order."""
    size, placements = config.image_size, _placements(config)
    batches = data.eval_batches(
        source, split=split, batch_size=POOL, image_size=size, seed=config.seed, placements=placements
    )
    try:
        read = [batch for batch, _ in zip(batches, range(_BATCHES))]
    finally:
        batches.close()
    return {key: np.concatenate([batch[key] for batch in read]) for key in read[0]}


def _placements(config):
    return quarters.PLACEMENT_SETS[config.quarter.placements]


def _name(source, split, label, index):
    classes = source.classes(split)
    known = classes is not None and 0 <= label < len(classes)
    return str(classes[label]).replace("_", " ") if known else f"image {index}"
