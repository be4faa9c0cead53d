"""Top-1 and top-5 accuracy of a classifier, from the rank of the true class among its scores."""

import jax
import jax.numpy as jnp
import numpy as np

from qbheat_jax.eval.evaluate import Metric


def ranks(scores, labels):
    """Return how many other classes score at least as high as the true one; 0 is right.

    Ties count against the classifier: equal scores for all classes are never right. NaN scores lose to all others.

    >>> ranks(np.array([[3.0, 2.0, 1.0], [1.0, 1.0, 1.0], [np.nan, 0.0, 1.0]]), [1, 0, 0]).tolist()
    [1, 2, 2]

    Args:
      scores: Float [N, ..., classes], numpy or jax.
      labels: Int [N], from 0 to classes - 1.

    Returns:
      Int [N, ...].
    """
    xp = jnp if isinstance(scores, jax.Array) else np
    scores = xp.where(xp.isnan(scores), -xp.inf, scores)
    index = xp.asarray(labels).reshape(-1, *[1] * (scores.ndim - 1))
    return (scores >= xp.take_along_axis(scores, index, -1)).sum(-1) - 1


def top(ranks):
    """Return {"top1", "top5"}: fractions of ranks below 1 and 5 over the first axis, int [N, ...] -> each [...]."""
    return {"top1": (ranks < 1).mean(0), "top5": (ranks < 5).mean(0)}


class Accuracy(Metric):
    """Top-1, top-5 and mean class accuracy over labelled images or clips.

    Mean class accuracy is the mean of the classes' top-1, over the classes that have examples. Details: "chance", the share of
    the commonest class.
    """

    name, headline = "accuracy", "top1"

    def __init__(self, objective, source, split, classes, outputs=None):
        """Prepare the metric.

        Args:
          objective: A method with `logits` and `pixels`.
          source: Of `data.open_source`, to name the images that have no label.
          split: Its split's name.
          classes: Number of outputs of the classifier.
          outputs: Int [classes of the data], the classifier's output for each class; None: they are the same.
        """
        self._objective, self._source, self._split, self._classes = objective, source, split, classes
        self._outputs = np.arange(classes) if outputs is None else np.asarray(outputs)

    def sums(self, variables, batch):
        """Return int32 counts: "n", "top1", "top5", "unlabelled"; "truth" and "right" [classes], by class."""
        logits = self._objective.logits(variables, self._objective.pixels.normalise(batch["image"]))
        label, mask = batch["label"], batch["mask"]
        truth = jnp.asarray(self._outputs)[jnp.maximum(label, 0)]
        rank, known = ranks(logits, truth), mask & (label >= 0)
        none = jnp.zeros(self._classes, jnp.int32)
        return {
            "n": mask.sum(),
            "top1": (known & (rank < 1)).sum(),
            "top5": (known & (rank < 5)).sum(),
            "unlabelled": (mask & ~known).sum(),
            "truth": none.at[truth].add(known),
            "right": none.at[truth].add(known & (rank < 1)),
        }

    def add(self, total, sums):
        """As `Metric.add`. Raise UserError for images without a label."""
        if sums["unlabelled"]:
            self._source.check_labelled(self._split, np.full(sums["unlabelled"], -1))
        return super().add(total, {name: value.astype(np.int64) for name, value in sums.items()})

    def figures(self, total):
        """Return ({"top1", "top5", "mean_class_accuracy"}, {"chance"}) of the sums of a split."""
        n, truth = total["n"], total["truth"]
        figures = {name: float(total[name] / n) for name in ("top1", "top5")}
        figures["mean_class_accuracy"] = float((total["right"] / np.maximum(truth, 1)).sum() / np.count_nonzero(truth))
        return figures, {"chance": float(truth.max() / n)}
