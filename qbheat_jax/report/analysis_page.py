"""The page of `qbheat analyse`: charts, tables and tiles of its files."""

import json
import pathlib

import numpy as np

from qbheat_jax import atomic
from qbheat_jax.errors import UserError, writing
from qbheat_jax.ops import heat
from qbheat_jax.report import charts, load_run, tiles
from qbheat_jax.report import text as text_lib
from qbheat_jax.report.template import template

FOLDER = "analysis"
# R^2 below which a curve leaves the chart.
LOWEST = -0.5

_NAMES = {
    "learnt": "learnt operator", "fitted": "fitted maps", "copy": "copying",
    "cosine": "cosines, fitted times", "mirror": "mirror image", "border": "nearest border cell",
    "mean": "mean of the quarter", "shuffled": "fitted, positions shuffled", "random": "fitted, untrained encoder",
}  # fmt: skip
# Names of the parts of the grid that are no single step.
_PARTS = {"diagonal": "diagonal", "hidden": "all hidden cells"}


def read(folder):
    """Return the variables of analysis.html.j2 for the analysis in a folder, or None where there is none."""
    folder = pathlib.Path(folder)
    try:
        result = json.loads((folder / "analysis.json").read_text())
        with np.load(folder / "pictures.npz") as file:
            arrays = dict(file)
    except (OSError, ValueError):
        return None
    result.setdefault("reconstructed", result["placements"])  # older files lack it
    trained = "trained" if result["init"] != "random" else "random"
    rows = _Rows(result["rows"], trained)
    return {
        "result": result,
        "trained": trained == "trained",
        "learnt": bool(rows.find("step", "learnt")),
        "summary": _summary(rows),
        "derivatives": _derivatives(rows),
        "steps": [_steps(rows, axis) for axis in "xy"],
        "quarters": _quarters(rows),
        "visible": rows.mean("quarter", "copy", "visible", None),
        "operators": _operators(result),
        "worst": heat.WORST_CONDITION,
        "drift": _drift(result["drift"]),
        "cards": _cards(arrays),
        "decoded": _decoded(result, arrays),
        "spread": _spread(folder),
        "downloads": _downloads(folder),
        "pixelated": result["image_size"] <= 96,
    }


def write(folder):
    """Write index.html, spectra.svg and, where there are any, speeds.svg into an analysis' folder. Return the page's path."""
    folder = pathlib.Path(folder)
    found = read(folder)
    if found is None:
        raise UserError(f"{folder} holds no analysis: there is no analysis.json in it that can be read")
    page = template("analysis_page.html.j2").render(analysis=found, shown=load_run.shown(folder))
    with writing(folder):
        atomic.write(folder / "index.html", page)
        atomic.write(folder / "spectra.svg", charts.alone(found["operators"]["svg"]))
        if found["operators"]["speeds_svg"]:
            atomic.write(folder / "speeds.svg", charts.alone(found["operators"]["speeds_svg"]))
    return folder / "index.html"


class _Rows:
    """Rows of figures, found by test, predictor, direction and so on."""

    def __init__(self, rows, trained):
        self.rows, self.trained = rows, trained

    def find(self, test, predictor, direction=None, distance=None, encoder=None, positions="true"):
        """Return the rows of one kind in their order. `direction` is a prefix: "x" means "x+" and "x-"."""
        return [
            row
            for row in self.rows
            if (row["test"], row["predictor"], row["positions"]) == (test, predictor, positions)
            and row["encoder"] == (encoder or self.trained)
            and (direction is None or row["direction"].startswith(direction))
            and (distance is None or row["distance"] == distance)
        ]

    def mean(self, *where, **more):
        """Return (r2, low, high), each the mean over the rows found, or None without rows."""
        rows = self.find(*where, **more)
        return tuple(float(np.mean([row[key] for row in rows])) for key in ("r2", "low", "high")) if rows else None


def _summary(rows):
    """Return the table of the three tests: {"predictors": names, "rows": [(test, (r2, low, high) or None of each)]}."""
    tests = (
        ("one derivative from the other", "derivatives", None, 1),
        ("a neighbouring cell", "step", None, 1),
        ("all hidden cells", "quarter", "hidden", None),
    )
    kinds = [(name, name, {}) for name in ("learnt", "fitted", "copy")]
    kinds.append(("shuffled", "fitted", {"positions": "shuffled"}))
    if rows.trained == "trained":
        kinds.append(("random", "fitted", {"encoder": "random"}))
    table = []
    for label, test, direction, distance in tests:
        values = [rows.mean(test, predictor, direction, distance, **more) for _, predictor, more in kinds]
        if any(values):
            table.append((label, values))
    short = {**_NAMES, "shuffled": "shuffled", "random": "untrained"}
    return {"predictors": [short[name] for name, _, _ in kinds], "rows": table}


def _derivatives(rows):
    """Return the chart of R^2 of one derivative from the other, with the two controls."""
    lines = []
    kinds = [(rows.trained, "true", "learnt" if rows.trained == "trained" else "random")]
    kinds += [("random", "true", "random")] * (rows.trained == "trained")
    kinds.append((rows.trained, "shuffled", "shuffled"))
    for name in dict.fromkeys(row["direction"] for row in rows.find("derivatives", "fitted")):
        for distance in dict.fromkeys(row["distance"] for row in rows.find("derivatives", "fitted")):
            for encoder, positions, key in kinds:
                found = rows.find("derivatives", "fitted", name, distance, encoder, positions)[0]
                what = {"shuffled": "shuffled", "true": "trained" if encoder == "trained" else "untrained"}[positions]
                short = "z\u2093 from z\u1d67" if name.startswith("z_x") else "z\u1d67 from z\u2093"
                label = f"{short}, \u00b1{distance}, {what}"
                lines.append((label, key, found["r2"], found["low"], found["high"]))
    return charts.intervals(lines, "derivatives")


def _steps(rows, axis):
    """Return the chart of R^2 over a distance along an axis, the mean of both ways, with the controls."""
    curves = []
    distances = sorted({row["distance"] for row in rows.find("step", "fitted", axis)})
    kinds = [("learnt", "learnt", {}), ("fitted", "fitted", {}), ("copy", "copy", {})]
    kinds.append(("shuffled", "fitted", {"positions": "shuffled"}))
    if rows.trained == "trained":
        kinds.append(("random", "fitted", {"encoder": "random"}))
    for key, predictor, more in kinds:
        values = [rows.mean("step", predictor, axis, distance, **more) for distance in distances]
        if None not in values:
            curves.append((_NAMES[key], key, distances, values))
    svg = charts.explained(curves, LOWEST, f"steps-{axis}")
    below = [label for label, _, _, values in curves if min(v[0] for v in values) < LOWEST]
    return {"svg": svg, "axis": {"x": "to the left and right", "y": "up and down"}[axis], "below": below}


def _quarters(rows):
    """Return the table of extrapolated quarters by part of the grid and predictor, or None."""
    names = ("learnt", "fitted", "copy", "cosine", "mirror", "border", "mean")
    predictors = [name for name in names if rows.find("quarter", name, "hidden")]
    if not predictors:
        return None
    steps = dict.fromkeys(
        (row["direction"], row["distance"]) for row in rows.find("quarter", "fitted") if row["distance"] is not None
    )
    ways = {"x+": "to the right", "x-": "to the left", "y+": "down", "y-": "up"}
    lines = [(f"{ways[way]}, {'half an' if d == 1 else 'a quarter of the'} image", way, d) for way, d in steps]
    lines += [(name, part, None) for part, name in _PARTS.items()]
    table = []
    for label, direction, distance in lines:
        values = [rows.mean("quarter", name, direction, distance) for name in predictors]
        control = rows.mean("quarter", "fitted", direction, distance, encoder="random")
        table.append({"label": label, "values": values, "control": control if rows.trained == "trained" else None})
    return {"predictors": [_NAMES[name] for name in predictors], "rows": table, "control": rows.trained == "trained"}


def _operators(result):
    """Return charts and figures of the fitted and learnt operators."""
    curves = []
    for key, operator in result["operators"].items():
        for name, values in operator["growth"].items():
            if name in ("x+", "y+"):
                dashed = "random" if name == "y+" and key == "fitted" else "copy" if name == "y+" else key
                curves.append((f"{_NAMES[key]}: {'A' if name == 'x+' else 'B'}+", dashed, values))
    fitted = result["operators"]["fitted"]
    cells = min(result["cells"]) / 2
    spectra = {name: np.array(values) @ [1, 1j] for name, values in fitted["spectrum"].items()}
    return {
        "svg": charts.spectra(spectra, cells, "fitted"),
        "growth": charts.growth(curves, "growth"),
        "cells": cells,
        "rows": [
            {
                "name": f"{_NAMES[key]}: {charts.DIRECTIONS[name]}",
                "norm": operator["norm"][name],
                "most": operator["growth"][name][0] if name in operator["growth"] else None,
                "median": float(np.median(operator["growth"][name])) if name in operator["growth"] else None,
            }
            for key, operator in result["operators"].items()
            for name in operator["norm"]
        ],
        "pairs": [
            {
                "name": _pair(key, sign),
                "commutator": value,
                "size": operator["S"].get(sign, {}).get("size"),
                "diagonal": operator["S"].get(sign, {}).get("diagonal"),
            }
            for key, operator in result["operators"].items()
            for sign, value in operator["commutator"].items()
        ],
        **_speeds(result),
    }


def _speeds(result):
    """Return {"speeds_svg": chart of the wave speeds or None, "speeds": their rows}; older files have none."""
    found = [
        (key, sign, speeds)
        for key, operator in result["operators"].items()
        for sign, speeds in operator.get("speeds", {}).items()
    ]
    groups = [
        (_pair(key, sign), key, sign == "+", np.array(speeds["values"]) @ [1, 1j])
        for key, sign, speeds in found
        if "values" in speeds
    ]
    return {
        "speeds_svg": charts.speeds(groups, "speeds") if groups else None,
        "speeds": [{"name": _pair(key, sign), **speeds} for key, sign, speeds in found],
    }


def _pair(key, sign):
    sign = sign.replace("-", text_lib.MINUS)
    return f"{_NAMES[key]}: A{sign}, B{sign}"


def _drift(rows):
    """Return [(step, its rows)] of the checkpoints, or [] of a single one."""
    steps = dict.fromkeys(row["step"] for row in rows)
    if len(steps) < 2:
        return []
    return [(step, [row for row in rows if row["step"] == step]) for step in steps]


def _cards(arrays):
    """Return the tiles of the feature maps, one dict for each image."""
    cards = []
    for i in range(len(arrays["images"])):
        card = {
            "image": tiles.data_uri(arrays["images"][i]),
            "like": tiles.data_uri(arrays["like"][i]),
            "map": tiles.data_uri(arrays["map"][i]),
            "placed": text_lib.placement(int(arrays["placed"][i])) if "placed" in arrays else None,
            "continued": [],
        }
        if "placed" in arrays:
            card["continued"] = [
                {
                    "name": _NAMES[key],
                    "map": tiles.data_uri(arrays[key][i]),
                    "error": tiles.data_uri(arrays[f"{key}_error"][i]),
                }
                for key in ("learnt", "fitted", "copy")
                if key in arrays
            ]
        cards.append(card)
    return cards


def _decoded(result, arrays):
    """Return the tiles of the reconstructions, or None without any."""
    if "reconstructed" not in arrays:
        return None
    rows = [
        {
            "original": tiles.data_uri(arrays["originals"][i]),
            "made": [
                (text_lib.placement(quarter), quarter in result["placements"], tiles.data_uri(picture))
                for quarter, picture in zip(result["reconstructed"], arrays["reconstructed"][i])
            ],
        }
        for i in range(len(arrays["originals"]))
    ]
    return {"rows": rows, "beyond": [tiles.data_uri(picture) for picture in arrays.get("beyond", ())]}


def _spread(folder):
    """Return the data URIs {"moving", "still"} of the animation and of its last frame, or None."""
    try:
        moving, still = ((folder / f"{name}.png").read_bytes() for name in ("spread", "spread_end"))
    except OSError:
        return None
    return {"moving": tiles.uri(moving, "image/png"), "still": tiles.uri(still, "image/png")}


def _downloads(folder):
    """Return [(file name, data URI)] of the files with all figures."""
    kinds = {"analysis.csv": "text/csv", "analysis.json": "application/json"}
    return [(name, tiles.uri((folder / name).read_bytes(), kind)) for name, kind in kinds.items()]
