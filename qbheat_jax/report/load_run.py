"""What a workdir holds, read into plain dataclasses. Whatever a run has not written yet is simply empty."""

import dataclasses
import json
import os
import pathlib
import statistics
from typing import Any

from qbheat_jax import api, methods
from qbheat_jax.errors import UserError
from qbheat_jax.train import config_tables, metrics

# What `init` of a probe's result may say besides the directory of a run.
BASELINES = {
    "random": "random initialisation",
    "histogram": "colour histogram, no encoder",
    "pixels": "raw pixels, no encoder",
}


@dataclasses.dataclass(frozen=True)
class Probe:
    """One result.json, of a probe or a detector. `features`: what the head saw, in words. `curve`: metrics, a dict a line."""

    name: str
    protocol: str
    features: str
    result: dict
    curve: list


@dataclasses.dataclass(frozen=True)
class Group:
    """Probes that differ in their seed alone. `chance` is a group without probes."""

    protocol: str
    data: str
    features: str
    probes: tuple

    def values(self, key):
        """The numbers under `key` in the results that have it."""
        return [probe.result[key] for probe in self.probes if isinstance(probe.result.get(key), (int, float))]

    def mean(self, key):
        values = self.values(key)
        return statistics.fmean(values) if values else None

    def spread(self, key):
        """Sample standard deviation, None where there are fewer than two."""
        values = self.values(key)
        return statistics.stdev(values) if len(values) > 1 else None


@dataclasses.dataclass(frozen=True)
class Run:
    """A workdir. shown: its path as a reader may type it; lines: of metrics.jsonl; summary: {} where there is none."""

    path: pathlib.Path
    shown: str
    config: Any
    lines: list
    summary: dict
    probes: tuple

    @property
    def method(self):
        """What the run learnt from, as it is called."""
        return methods.of(self.config).TITLE

    def series(self, name, start=0):
        """(steps, values) of one metric, from step `start` on."""
        return series(self.lines, name, start)

    def last(self, name):
        """The newest value of a metric, or None."""
        return next((line[name] for line in reversed(self.lines) if name in line), None)

    def groups(self, figure="top1"):
        """Probes (or, by "AP", detectors) by protocol, data and features, the protocols and groups in the order shown."""
        found = {}
        for probe in (p for p in self.probes if isinstance(p.result.get(figure), (int, float))):
            key = (probe.protocol, str(probe.result.get("data", "")), probe.features)
            found.setdefault(key, []).append(probe)
        groups = [Group(*key, tuple(sorted(probes, key=_seed))) for key, probes in found.items()]
        return sorted(groups, key=lambda g: (g.protocol, g.data, -(g.mean(figure) or 0.0)))


def series(lines, name, start=0):
    """As `Run.series`, of the lines of a metrics.jsonl."""
    points = [(line["step"], line[name]) for line in lines if name in line and line["step"] >= start]
    return [step for step, _ in points], [value for _, value in points]


def read(workdir):
    """WORKDIR -> Run. Raises UserError where it holds no run that was pre-trained."""
    path, config = pathlib.Path(workdir), api.read_config(workdir)
    table = config_tables.of(config)
    if table is config_tables.CLASSIFIER:
        raise UserError(f"--workdir {workdir} holds ported weights, not a run: there is nothing to report")
    if table is config_tables.FINETUNE:
        raise UserError(
            f"--workdir {workdir} holds a fine-tuned classifier: report the run that it began with, which shows it where "
            "it lies below that"
        )
    summary = read_json(path / "summary.json")
    summary = summary if isinstance(summary, dict) else {}
    return Run(path, shown(path), config, metrics.read(path), summary, _probes(path, config))


def shown(path):
    """The path as a reader may type it: relative where it lies below the current directory, else as it was given."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith(os.pardir) else relative


def typed(text, path):
    """A recorded command with a directory written as `shown`, whatever machine it was recorded on."""
    return " ".join(text.replace(str(pathlib.Path(path).resolve()), shown(path)).split()) if text else ""


def _probes(path, config):
    probes = []
    for file in sorted(path.glob("**/result.json")):
        folder = file.parent.relative_to(path)
        result = read_json(file)
        if folder.parts[:1] == ("report",) or not isinstance(result, dict):
            continue
        if isinstance(result.get("protocol"), str) and any(
            isinstance(result.get(k), (int, float)) for k in ("top1", "AP")
        ):
            features = _features(str(result.get("init", "")), path, methods.of(config).TITLE)
            probes.append(Probe(str(folder), _protocol(result), features, result, metrics.read(file.parent)))
    return tuple(probes)


def _protocol(result):
    """Few-shot probes are told apart: their accuracy is not that of a probe with all labels."""
    share = result.get("fraction", 1)
    return result["protocol"] if share == 1 else f"{result['protocol']}, {100 * share:g} % of the labels"


def _features(init, path, method):
    if init in BASELINES:
        return BASELINES[init]
    # A workdir may have been moved since: only a directory that is there, and is another one, is another run.
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
    """What a JSON file holds, or None where there is none or it is torn."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
