"""Measure a model on a split: one loop, and one file a metric. A metric that a method names is found by being there."""

import importlib


def metric_of(method):
    """Return the `evaluate.Metric` subclass of a method that names one: METRIC of `eval/NAME.py`, NAME its `METRIC`."""
    return importlib.import_module(f"{__name__}.{method.METRIC}").METRIC
