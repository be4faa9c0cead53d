"""Mean intersection over union and pixel accuracy of segmentation, from the counts of true and predicted class."""

import numpy as np

from qbheat_jax.data.specs.masks import IGNORED

# The figures, the headline first.
QUOTED = ("mIoU", "pixel_accuracy")


def pairs(truth, found, classes):
    """Count the pixels of every pair of true and predicted class.

    >>> pairs(np.array([0, 1, 1, IGNORED]), np.array([0, 0, IGNORED, 1]), 2).tolist()
    [[1, 0, 0], [1, 0, 1]]

    Args:
      truth, found: uint8 [...]. Pixels whose truth is IGNORED do not count; a prediction of IGNORED is never right.
      classes: Number of classes.

    Returns:
      int64 [classes, classes + 1], by truth and prediction. The last column counts the predictions of IGNORED.
    """
    counted = truth != IGNORED
    flat = truth[counted].astype(np.int64) * (classes + 1) + np.minimum(found[counted], classes)
    return np.bincount(flat, minlength=classes * (classes + 1)).reshape(classes, classes + 1)


def figures(pairs, names):
    """Return {"mIoU", "pixel_accuracy", "per_class": {name: IoU}} of the counts of `pairs`.

    The mean is over the classes that the truth or the prediction has; others are in no figure. Without any pixel the two
    figures are None.

    >>> figures(np.array([[3, 1, 0], [0, 4, 0]]), ["sky", "sea"])
    {'mIoU': 0.775, 'pixel_accuracy': 0.875, 'per_class': {'sky': 0.75, 'sea': 0.8}}
    """
    square = pairs[:, :-1]
    right = square.diagonal()
    either = pairs.sum(1) + square.sum(0) - right
    each = {name: float(r / e) for name, r, e in zip(names, right, either) if e}
    if not each:
        return {"mIoU": None, "pixel_accuracy": None, "per_class": {}}
    return {
        "mIoU": float(np.mean([*each.values()])),
        "pixel_accuracy": float(right.sum() / pairs.sum()),
        "per_class": each,
    }


def constant(truth, chosen):
    """Return the counts of `pairs` of the prediction that names class `chosen` for every pixel.

    truth: int64 [classes], the pixels of each class.
    """
    found = np.zeros((len(truth), len(truth) + 1), np.int64)
    found[:, chosen] = truth
    return found
