"""The page of several runs: their table, and the curves of all metrics that they share, in one file."""

import math
import pathlib

from qbheat_jax.errors import UserError
from qbheat_jax.report import charts, environment, load_run, runs
from qbheat_jax.report.template import save, template

# Runs whose curves are drawn: as many as there are styles to tell them apart.
MOST = len(charts.RUN_STYLES)


def write(path, directory, rows, skipped):
    """Write the page of the `runs.Row`s to `path` and return it. Raise UserError where there is nothing to compare."""
    if not rows:
        raise UserError(f"--page {path}: there are no runs under {directory} to compare")
    page = template("runs.html.j2").render(context(directory, rows, skipped))
    return save(pathlib.Path(path), page)


def context(directory, rows, skipped):
    """Return the variables of the template."""
    drawn = rows[:MOST]
    found = runs.names(rows)
    return {
        "shown": load_run.shown(directory),
        "rows": rows,
        "names": found,
        "best": {name: max(row.results[name] for row in rows if name in row.results) for name in found},
        "skipped": skipped,
        "samples": {row.run: charts.sample(n) for n, row in enumerate(drawn)},
        "left": len(rows) - len(drawn),
        "charts": [chart for n, name in enumerate(shared(drawn)) if (chart := _chart(name, f"m{n}", drawn))],
        "versions": environment.versions(),
    }


def shared(rows):
    """Return the metrics that two runs have, or the only one: the losses first."""
    counts = {}
    for row in rows:
        for name in {name for line in row.lines for name in line} - {"step"}:
            counts[name] = counts.get(name, 0) + 1
    shown = [name for name, count in counts.items() if count >= min(2, len(rows))]
    return sorted(shown, key=lambda name: (name != "train/loss", not name.endswith("/loss"), name))


def _chart(name, key, rows):
    """Return the chart of one metric, or None where it has no finite values."""
    curves = []
    for n, row in enumerate(rows):
        points = [(line["step"], line[name]) for line in row.lines if _finite(line.get(name))]
        if points:
            curves.append((n, *zip(*sorted(points))))
    if not curves:
        return None
    return {"name": name, "svg": charts.overlay(curves, key), "runs": [rows[n].run for n, *_ in curves]}


def _finite(value):
    return isinstance(value, (int, float)) and math.isfinite(value)
