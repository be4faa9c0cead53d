"""Measure a model on a split: one loop, and one file a metric."""

import importlib


def metric_of(method):
    """Return the `evaluate.Metric` subclass that measures a method: METRIC of the file in `eval/` that the method names."""
    return importlib.import_module(f"{__name__}.{method.METRIC}").METRIC
