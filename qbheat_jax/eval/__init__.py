"""Measure a model on a split: one loop, and one file a metric."""
