"""Right or wrong: the rank of the true class among a classifier's scores."""

import numpy as np


def ranks(scores, labels):
    """How many other classes score at least as high as the true one: [N, ..., classes], int [N] -> int [N, ...].

    0 is right. Ties count against the classifier: one that says the same of all classes is not right about any; nor is
    one whose scores are not numbers.
    """
    scores = np.nan_to_num(scores, nan=-np.inf)
    index = np.asarray(labels).reshape(-1, *[1] * (scores.ndim - 1))
    return (scores >= np.take_along_axis(scores, index, -1)).sum(-1) - 1


def top(ranks, classes):
    """{"top1", "top5"}: shares of 1 over the first axis; among fewer than five classes every answer is in the top 5."""
    return {"top1": (ranks < 1).mean(0), "top5": (ranks < min(5, classes)).mean(0)}
