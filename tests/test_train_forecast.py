"""The warning that a run will take hours: on CPUs alone, once, after three steps."""

import logging

import jax
import jax.numpy as jnp
import pytest

from qbheat_jax.train import config_tables, metrics

CONFIG = config_tables.resolve({"image_size": 256, "total_epochs": 7.0, "encoder.name": "mobilenet_v2"})


def warnings(monkeypatch, caplog, ends, total, start=0):
    """What is said of a run whose steps end at these seconds."""
    clock = iter(ends)
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    forecast = metrics.Forecast(start, total, CONFIG)
    for n in range(len(ends) + 2):  # the clock is not looked at any more
        forecast.after(start + 1 + n, jnp.zeros(()))
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_hours_are_announced_with_what_to_change(monkeypatch, caplog):
    (told,) = warnings(monkeypatch, caplog, (100.0, 137.0, 176.0), 1003)
    for words in ("about 10 hours", "configs/folder_small.py", "image_size=256", "total_epochs=7", "mobilenet_v2"):
        assert words in told


@pytest.mark.parametrize(
    "ends, total, start, count",
    [
        ((60.0, 61.0, 62.0), 3603, 0, 0),  # an hour sharp
        ((60.0, 61.0, 62.0), 3604, 0, 1),
        ((60.0, 65.0, 65.1), 3603, 0, 0),  # the second step waited for data
        ((60.0, 61.0, 62.0), 103_604, 100_000, 1),  # resumed: what is left counts
        ((60.0, 61.0, 62.0), 103_000, 100_000, 0),
    ],
)
def test_the_limit_is_an_hour_of_what_is_left(monkeypatch, caplog, ends, total, start, count):
    assert len(warnings(monkeypatch, caplog, ends, total, start)) == count


@pytest.mark.parametrize("name, value", [("default_backend", "gpu"), ("process_index", 1)])
def test_accelerators_and_other_processes_are_silent(monkeypatch, caplog, name, value):
    monkeypatch.setattr(jax, name, lambda: value)
    assert warnings(monkeypatch, caplog, (), 10**6) == []
