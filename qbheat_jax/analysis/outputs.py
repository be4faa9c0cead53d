"""Write an analysis as files (analysis.json, analysis.csv, pictures) and as a table of text."""

import csv
import io
import json

import numpy as np

from qbheat_jax import atomic
from qbheat_jax.errors import writing
from qbheat_jax.report.analysis_page import FOLDER

COLUMNS = ("encoder", "positions", "test", "predictor", "direction", "distance", "r2", "low", "high", "ridge")


def folder(workdir, init):
    """Return the folder of the files: WORKDIR/analysis where the path WORKDIR is the run analysed, else WORKDIR."""
    own = init != "random" and workdir.exists() and workdir.resolve() == type(workdir)(init).resolve()
    return workdir / FOLDER if own else workdir


def make(path):
    """Make a folder. Raise UserError where it cannot be written."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def write(path, result, arrays, pictures):
    """Write PATH/analysis.csv, pictures.npz (`arrays`), NAME.png (`pictures`, {name: bytes}) and, last, analysis.json."""
    with writing(path):
        (path / "analysis.csv").write_text(table(result["rows"]))
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        (path / "pictures.npz").write_bytes(buffer.getvalue())
        for name, picture in pictures.items():
            (path / f"{name}.png").write_bytes(picture)
        atomic.write(path / "analysis.json", json.dumps(result) + "\n")


def table(rows):
    """Return rows of figures as CSV, numbers in full."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def text(result):
    """Return the result as Markdown tables: R^2 of each test and distance, the mean over directions; wave speeds."""
    lines = [("encoder", "positions", "test", "distance", "predictor", "R^2")]
    for (encoder, positions, test, predictor, distance), found in grouped(result["rows"]).items():
        lines.append((encoder, positions, test, distance, predictor, f"{np.mean([row['r2'] for row in found]):+.3f}"))
    return f"{_aligned(lines)}\n\n{_speeds(result['operators'])}"


def _speeds(operators):
    """Return the table of the wave speeds of each pair, see `operators.describe`."""
    lines = [("wave speeds", "condition of B", "real", "median", "smallest", "largest")]
    for key, operator in operators.items():
        for sign, found in operator["speeds"].items():
            condition = "infinite" if found["condition"] is None else f"{found['condition']:.3g}"
            figures = ("none: B is singular or nearly so", "", "", "")
            if "values" in found:
                sizes = np.abs(np.array(found["values"]) @ [1, 1j])
                figures = (
                    f"{found['real']:.0%}", f"{found['median']:.3g}", f"{sizes.min():.3g}", f"{sizes.max():.3g}"
                )  # fmt: skip
            lines.append((f"{key} A{sign}, B{sign}", condition, *figures))
    return _aligned(lines)


def _aligned(lines):
    """Return rows of text as a Markdown table; the first is the header."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = [lines[0], tuple("-" * width for width in widths), *lines[1:]]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in lines)


def grouped(rows):
    """Return {(encoder, positions, test, predictor, distance as text): rows that differ in direction alone}."""
    groups = {}
    for row in rows:
        if row["distance"] is None:
            distance = row["direction"]
        else:
            distance = f"{row['distance']:g} {'half images' if row['test'] == 'quarter' else 'cells'}"
        key = (row["encoder"], row["positions"], row["test"], row["predictor"], distance)
        groups.setdefault(key, []).append(row)
    return groups
