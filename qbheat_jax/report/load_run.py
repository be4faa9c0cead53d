"""Read a workdir into plain dataclasses. What a run has not written yet is empty."""

import dataclasses
import json
import os
import pathlib
import statistics
from typing import Any

from qbheat_jax import api, methods
from qbheat_jax.errors import UserError
from qbheat_jax.train import config_tables, metrics

# Values of `init` in a probe's result that are no directory, and their names on the pages.
BASELINES = {
    "random": "random initialisation",
    "histogram": "colour histogram, no encoder",
    "pixels": "raw pixels, no encoder",
}


@dataclasses.dataclass(frozen=True)
class Probe:
    """One result.json of a probe or a detector.

    Attributes:
      features: name of the features that the head takes.
      curve: lines of metrics.jsonl.
    """

    name: str
    protocol: str
    features: str
    result: dict
    curve: list


@dataclasses.dataclass(frozen=True)
class Group:
    """Probes that differ in their seed alone."""

    protocol: str
    data: str
    features: str
    probes: tuple

    def values(self, key):
        """Return the numbers under `key` in the results that have it."""
        return [probe.result[key] for probe in self.probes if isinstance(probe.result.get(key), (int, float))]

    def mean(self, key):
        values = self.values(key)
        return statistics.fmean(values) if values else None

    def spread(self, key):
        """Return the sample standard deviation, or None of fewer than two values."""
        values = self.values(key)
        return statistics.stdev(values) if len(values) > 1 else None


@dataclasses.dataclass(frozen=True)
class Run:
    """A workdir.

    Attributes:
      shown: its path as a reader may type it.
      lines: of metrics.jsonl.
      summary: of summary.json; {} without one.
    """

    path: pathlib.Path
    shown: str
    config: Any
    lines: list
    summary: dict
    probes: tuple

    @property
    def method(self):
        """The name of the run's method."""
        return methods.of(self.config).TITLE

    def series(self, name, start=0):
        """Return (steps, values) of one metric, from step `start` on."""
        return series(self.lines, name, start)

    def last(self, name):
        """Return the newest value of a metric, or None."""
        return next((line[name] for line in reversed(self.lines) if name in line), None)

    def groups(self, figure="top1"):
        """Return the Groups of probes (by figure "top1"), segmentations ("mIoU") or detectors ("AP"), in the order shown."""
        found = {}
        for probe in (p for p in self.probes if isinstance(p.result.get(figure), (int, float))):
            key = (probe.protocol, str(probe.result.get("data", "")), probe.features)
            found.setdefault(key, []).append(probe)
        groups = [Group(*key, tuple(sorted(probes, key=_seed))) for key, probes in found.items()]
        return sorted(groups, key=lambda g: (g.protocol, g.data, -(g.mean(figure) or 0.0)))


def series(lines, name, start=0):
    """Return (steps, values) of one metric in the lines of a metrics.jsonl."""
    points = [(line["step"], line[name]) for line in lines if name in line and line["step"] >= start]
    return [step for step, _ in points], [value for _, value in points]


def read(workdir):
    """Return the Run in a workdir. Raise UserError where it holds no pre-trained run."""
    path, config = pathlib.Path(workdir), api.read_config(workdir)
    table = config_tables.of(config)
    if table is config_tables.CLASSIFIER:
        raise UserError(f"--workdir {workdir} holds ported weights, not a run: there is nothing to report")
    if table is config_tables.FINETUNE:
        raise UserError(
            f"--workdir {workdir} holds a fine-tuned classifier: report the run that it started from; its page shows the "
            "classifiers below its own workdir"
        )
    summary = read_json(path / "summary.json")
    summary = summary if isinstance(summary, dict) else {}
    return Run(path, shown(path), config, metrics.read(path), summary, _probes(path, config))


def shown(path):
    """Return a path relative to the current directory where it lies below it, else as given."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith(os.pardir) else relative


def typed(text, path):
    """Return a recorded command with the directory `path` written as `shown(path)`."""
    return " ".join(text.replace(str(pathlib.Path(path).resolve()), shown(path)).split()) if text else ""


def _probes(path, config):
    probes = []
    for file in sorted(path.glob("**/result.json")):
        folder = file.parent.relative_to(path)
        result = read_json(file)
        if folder.parts[:1] == ("report",) or not isinstance(result, dict):
            continue
        if isinstance(result.get("protocol"), str) and any(
            isinstance(result.get(k), (int, float)) for k in ("top1", "mIoU", "AP")
        ):
            features = _features(str(result.get("init", "")), path, methods.of(config).TITLE)
            probes.append(Probe(str(folder), _protocol(result), features, result, metrics.read(file.parent)))
    return tuple(probes)


def _protocol(result):
    """Return the protocol's name, with the share of labels of a few-shot probe."""
    share = result.get("fraction", 1)
    return result["protocol"] if share == 1 else f"{result['protocol']}, {100 * share:g} % of the labels"


def _features(init, path, method):
    if init in BASELINES:
        return BASELINES[init]
    # The workdir may have moved, so only an existing directory other than this one is another run.
    other = bool(init) and os.path.isdir(init) and not os.path.samefile(init, path)
    if not other:
        return method
    trained = read_json(pathlib.Path(init) / "config.json")
    other = methods.METHODS.get(trained.get("objective")) if isinstance(trained, dict) else None
    method = method if other is None else other.TITLE
    return f"{method}, run {os.path.basename(os.path.normpath(init))}"


def _seed(probe):
    return str(probe.result.get("seed", "")), probe.name


def read_json(path):
    """Return the content of a JSON file, or None where it is missing or torn."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
