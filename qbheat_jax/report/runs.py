"""List all runs under a directory: read what their workdirs hold, order them, and show them as a table or as JSON."""

import dataclasses
import datetime
import math
import os
import pathlib
import statistics

from qbheat_jax import config as config_lib
from qbheat_jax import methods
from qbheat_jax.errors import UserError, first_line, unknown
from qbheat_jax.eval import metric_of
from qbheat_jax.report import load_run
from qbheat_jax.train import config_tables, lock, metrics

# Folders of a workdir that hold no runs.
_WITHOUT_RUNS = ("checkpoints", "features", "report", "profile", "analysis")
# Columns that `ordered` takes beside the results, and whether the largest value comes first.
COLUMNS = {
    "run": False, "method": False, "encoder": False, "data": False, "step": True, "loss": False, "when": True,
    "state": False,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """One run: a workdir of `pretrain`, `finetune` or `detect`.

    Attributes:
      run: its path, relative to the directory that was listed.
      data: the spec of its data source.
      step: the newest step logged; 0 if none was.
      steps: the length of the run in steps; None where it is given in epochs and the run is not finished.
      epochs: the length in epochs, where the config gives it so.
      loss: the newest training loss, or None.
      results: {name of a probe or detector: mean of its headline over seeds}, fractions.
      when: the last write to its log, seconds since 1970.
      state: "running", "finished", "failed" or "killed".
      reason: why a failed run failed.
      lines: of metrics.jsonl.
    """

    run: str
    path: pathlib.Path
    method: str
    encoder: str
    data: str
    step: int
    steps: int | None
    epochs: float | None
    loss: float | None
    results: dict
    when: float
    state: str
    reason: str
    lines: list = dataclasses.field(repr=False)

    @property
    def length(self):
        """The step and the run's length, as text."""
        if self.steps is None and self.epochs is not None:
            return f"{self.step} ({self.epochs:g} epochs)"
        return f"{self.step} of {self.steps}"

    @property
    def date(self):
        """The time of the last write in local time, as text."""
        return datetime.datetime.fromtimestamp(self.when).strftime("%Y-%m-%d %H:%M")

    def to_json(self):
        """Return the row as a dict for JSON, without the lines."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "lines"}
        when = datetime.datetime.fromtimestamp(self.when, datetime.UTC).isoformat(timespec="seconds")
        return {**values, "path": str(self.path), "when": when}


def find(directory):
    """Return ([Row, ...] in the order of their paths, {path: why it was skipped}).

    Folders that hold a config.json but no run that can be read are skipped: damaged ones, ported weights, and those of
    other programs.

    Raises:
      UserError: there is no such directory.
    """
    root = pathlib.Path(directory)
    if not root.is_dir():
        raise UserError(f"DIR {directory} is no directory: name the one that holds the workdirs")
    rows, results, skipped = [], [], {}

    def unlisted(error):
        skipped[str(error.filename)] = str(error.strerror)

    for folder, below, files in os.walk(root, onerror=unlisted):
        folder = pathlib.Path(folder)
        is_run = "config.json" in files
        below[:] = sorted(n for n in below if not n.startswith(".") and not (is_run and n in _WITHOUT_RUNS))
        if "result.json" in files:
            results.append((folder, load_run.read_json(folder / "result.json")))
        if is_run:
            try:
                row = _row(folder, root)
            except (UserError, OSError, ValueError, TypeError, KeyError) as error:
                skipped[str(folder)] = first_line(error)
            else:
                rows += [row] if row else []
    _assign(rows, results)
    return rows, skipped


def _row(folder, root):
    """Return the Row of a folder with a config.json, or None of a probe. Raise UserError or ValueError of any other."""
    given = load_run.read_json(folder / "config.json")
    if not isinstance(given, dict):
        raise ValueError("config.json is no config")
    if "protocol" in given and "objective" not in given:
        return None
    config = config_tables.from_json((folder / "config.json").read_text())
    if config_tables.of(config) is config_tables.CLASSIFIER:
        raise ValueError("ported weights, not a run")
    lines = metrics.read(folder)
    step = max((line["step"] for line in lines if "train/loss" in line), default=0)
    finished = _finished(folder, step)
    state, reason = ("finished", "") if finished else lock.state(folder)
    if not finished and state not in ("running", "failed"):
        state = "killed"
    flat, log = config_lib.flatten(config), folder / "metrics.jsonl"
    return Row(
        run=os.path.relpath(folder, root),
        path=folder,
        method=methods.of(config).TITLE,
        encoder=config.encoder.name,
        data=config.data.source,
        step=step,
        steps=step if finished else flat.get("total_steps"),
        epochs=flat.get("total_epochs"),
        loss=next((line["train/loss"] for line in reversed(lines) if _number(line.get("train/loss"))), None),
        results={},
        when=(log if log.exists() else folder / "config.json").stat().st_mtime,
        state=state,
        reason=reason,
        lines=lines,
    )


def _finished(folder, step):
    """Return whether a run's last file, written when all is done, belongs to its newest step."""
    for name in ("summary.json", "result.json"):
        last = load_run.read_json(folder / name)
        if isinstance(last, dict) and last.get("step") == step:
            return True
    return False


def _assign(rows, results):
    """Fill in the results of the rows.

    A result belongs to the run in its folder, and to the run that its `init` names, or, if the folders have moved since,
    to the nearest run above it.
    """
    found = {os.path.realpath(row.path): {} for row in rows}
    names = {os.path.realpath(row.path): row for row in rows}
    for folder, result in results:
        figure = _figure(result)
        if figure is None:
            continue
        own = os.path.realpath(folder)
        for place in {own, _measured(own, str(result.get("init", "")), names)} & set(names):
            data = str(result.get("data", ""))
            label = figure[0] if data in ("", names[place].data) else f"{figure[0]} on {data}"
            found[place].setdefault(label, []).append(figure[1])
    for place, row in names.items():
        row.results.update({label: statistics.fmean(values) for label, values in sorted(found[place].items())})


def _measured(folder, init, names):
    """Return the path of the run whose encoder a result in `folder` is of, or None."""
    if init in load_run.BASELINES:
        return None
    if os.path.isdir(init):
        return os.path.realpath(init)
    return next((str(parent) for parent in pathlib.Path(folder).parents if str(parent) in names), None)


def _figure(result):
    """Return (name, headline) of a result, or None where it has none."""
    protocol = result.get("protocol") if isinstance(result, dict) else None
    if not isinstance(protocol, str):
        return None
    method, share = methods.METHODS.get(protocol), result.get("fraction", 1)
    value = result.get(metric_of(method).headline if method is not None and method.METRIC else "top1")
    name = protocol if share == 1 or not _number(share) else f"{protocol}-{100 * share:g}pct"
    return (name, value) if _number(value) else None


def _number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def ordered(rows, key):
    """Return the rows in the order of a column of COLUMNS, or of a result with the best first. Missing values come last.

    Raises:
      UserError: no such column.
    """
    known = [*COLUMNS, *names(rows)]
    if key not in known:
        raise unknown(f"--sort {key}", key, known)

    def value(row):
        return row.results.get(key) if key not in COLUMNS else getattr(row, key)

    there = sorted((row for row in rows if value(row) is not None), key=value, reverse=COLUMNS.get(key, True))
    return there + [row for row in rows if value(row) is None]


def names(rows):
    """Return the names of all results, in order."""
    return sorted({name for row in rows for name in row.results})


def table(rows, skipped):
    """Return the rows as a Markdown table, and below it why runs failed and how many folders were skipped."""
    found = names(rows)
    head = ("run", "method", "encoder", "data", "step", "loss", *found, "when", "state")
    cells = [head]
    for row in rows:
        loss = "-" if row.loss is None else f"{row.loss:.4f}"
        results = (f"{row.results[name]:.3f}" if name in row.results else "-" for name in found)
        cells.append((row.run, row.method, row.encoder, row.data, row.length, loss, *results, row.date, row.state))
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, tuple("-" * width for width in widths))
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in cells]
    lines += [f"{row.run} failed: {row.reason}" for row in rows if row.state == "failed"]
    if skipped:
        lines.append(f"{len(skipped)} folder{'s' * (len(skipped) > 1)} skipped; --json says why")
    return "\n".join(lines)
