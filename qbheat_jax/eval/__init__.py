"""Measure a model on a split: one loop, and one file a metric."""

import importlib


def metric_of(method):
    """Return the `evaluate.Metric` subclass that measures a method: METRIC of the file in `eval/` that the method names."""
    return importlib.import_module(f"{__name__}.{method.METRIC}").METRIC


def quoted(result):
    """Return the names of a result's figures to quote, the headline first. Results of older versions name none.

    >>> quoted({"top1": 0.9, "top5": 1.0})
    ('top1', 'top5')
    """
    if "metrics" in result:
        return tuple(result["metrics"])
    return ("AP", "AP50", "AP75") if "AP" in result else ("top1", "top5")
