"""An analysis as files: analysis.json, analysis.csv, pictures; and as a few lines of text."""

import csv
import io
import json

import numpy as np

from qbheat_jax import atomic
from qbheat_jax.errors import writing
from qbheat_jax.report.analysis_page import FOLDER

COLUMNS = ("encoder", "positions", "test", "predictor", "direction", "distance", "r2", "low", "high", "ridge")


def folder(workdir, init):
    """Where the files go: WORKDIR/analysis where WORKDIR (a path) is the run that is analysed, else WORKDIR."""
    own = init != "random" and workdir.exists() and workdir.resolve() == type(workdir)(init).resolve()
    return workdir / FOLDER if own else workdir


def make(path):
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def write(path, result, arrays, pictures):
    """Writes PATH/analysis.csv, pictures.npz (arrays, for the page), NAME.png ({name: bytes}) and, last, analysis.json."""
    with writing(path):
        (path / "analysis.csv").write_text(table(result["rows"]))
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        (path / "pictures.npz").write_bytes(buffer.getvalue())
        for name, picture in pictures.items():
            (path / f"{name}.png").write_bytes(picture)
        atomic.write(path / "analysis.json", json.dumps(result) + "\n")


def table(rows):
    """Rows of figures as CSV, numbers in full."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def text(result):
    """What was found, as a Markdown table: mean over the directions of each test, at its shortest and longest distance."""
    lines = [("encoder", "positions", "test", "distance", "predictor", "R^2")]
    for (encoder, positions, test, predictor, distance), found in grouped(result["rows"]).items():
        lines.append((encoder, positions, test, distance, predictor, f"{np.mean([row['r2'] for row in found]):+.3f}"))
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in lines)


def grouped(rows):
    """Rows that differ in direction alone -> {(encoder, positions, test, predictor, distance in words): rows}."""
    groups = {}
    for row in rows:
        if row["distance"] is None:
            distance = row["direction"]
        else:
            distance = f"{row['distance']:g} {'half images' if row['test'] == 'quarter' else 'cells'}"
        key = (row["encoder"], row["positions"], row["test"], row["predictor"], distance)
        groups.setdefault(key, []).append(row)
    return groups
