"""Draw the images that a report shows, by the run's seed, from distinct classes if there are labels."""

import dataclasses

import numpy as np

from qbheat_jax import data
from qbheat_jax.data.bad_files import BadFiles
from qbheat_jax.data.specs import image
from qbheat_jax.ops import quarters

# Images over which errors are averaged.
POOL = 64

# Batches of a sequential source that are searched for distinct labels.
_BATCHES = 16

RULE = "Images are drawn at random from as many classes as possible; those with the most contrast come first."


@dataclasses.dataclass(frozen=True)
class Sample:
    """Images of the evaluation split.

    Attributes:
      images: uint8 [N, H, W, 3], the first ones of distinct labels.
      names: N names.
      split: of the source.
      trained_on: whether the run trained on that split.
      sizes: {split: images} of the source; {} if unknown.
      rule: a sentence on how the images were chosen.
    """

    images: np.ndarray
    names: tuple
    split: str
    trained_on: bool = False
    sizes: dict = dataclasses.field(default_factory=dict)
    rule: str = ""


def count(placements):
    """Return the number of images to show for this many placements: fewer for more, to keep the page short."""
    return 8 if placements < 3 else 6 if placements < 6 else 4


def draw(config):
    """Return a Sample of at most POOL images for a run's config. Raise UserError where the source cannot be opened."""
    source = data.open_source(config.data.source, image_size=config.image_size, tfds_dir=config.data.tfds_dir)
    split = next((name for name in ("test", "val", "train") if name in source.splits), next(iter(source.splits)))
    batch = (_picked if source.random_access else _first)(source, split, config)
    batch = {key: values[batch["mask"]] for key, values in batch.items()}
    order = contrast_first(batch, distinct_first(batch["label"])[:POOL])
    names = [_name(source, split, batch["label"][i], batch["index"][i]) for i in order]
    trained_on = split == config.data.split
    return Sample(batch["image"][order], tuple(names), split, trained_on, dict(source.splits), RULE)


def distinct_first(labels):
    """Return the indices of labels int [n], first occurrences of each label first, then the others, both in order.

    >>> distinct_first(np.array([3, 3, 1, 3, 1, 2])).tolist()
    [0, 2, 5, 1, 3, 4]
    """
    first = np.sort(np.unique(labels, return_index=True)[1])
    return np.concatenate([first, np.setdiff1d(np.arange(len(labels)), first)])


def contrast_first(batch, order):
    """Return `order` with the images of distinct labels sorted by contrast, the highest first.

    Images with structure show more and are harder to predict. Predictions play no part in the choice.

    Args:
      batch: {"image" uint8 [n, H, W, 3], "label" int [n]}.
      order: indices, as `distinct_first` returns them.
    """
    distinct = len(np.unique(batch["label"][order]))
    first = order[: distinct if distinct > 1 else len(order)]
    contrast = batch["image"][first].std((1, 2)).mean(1)
    return np.concatenate([first[np.argsort(-contrast, kind="stable")], order[len(first) :]])


def _picked(source, split, config):
    """Return a batch of POOL examples of a random-access source, without reading any other image."""
    order = np.random.default_rng(config.seed).permutation(source.splits[split])
    labels = source.labels(split)
    if labels is not None:
        order = order[distinct_first(np.asarray(labels)[order])]
    indices = order[:POOL].astype(np.int64)
    spec = _spec(config)

    def fetch(_, index):
        return source.fetch(split, index)

    return image.build(spec, fetch, np.zeros_like(indices), indices, BadFiles(1.0, len(indices)))


def _first(source, split, config):
    """Return the first batches of a sequential source as one."""
    batches = data.eval_batches(source, _spec(config), split=split, batch_size=POOL)
    try:
        read = [batch for batch, _ in zip(batches, range(_BATCHES))]
    finally:
        batches.close()
    return {key: np.concatenate([batch[key] for batch in read]) for key in read[0]}


def _spec(config):
    return image.ImageSpec(config.image_size, config.seed, quarters.PLACEMENT_SETS[config.quarter.placements])


def _name(source, split, label, index):
    classes = source.classes(split)
    known = classes is not None and 0 <= label < len(classes)
    return str(classes[label]).replace("_", " ") if known else f"image {index}"
