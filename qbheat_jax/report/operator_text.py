"""Figures and a chart of the matrices A and B of a run."""

import math

import numpy as np

from qbheat_jax.ops import heat
from qbheat_jax.report import charts, text


def describe(operator):
    """Return the figures and the charts of A and B as a dict, or None without them.

    operator: (parameters, `heat.Heat`) of `Method.operator`, or None.
    """
    if operator is None:
        return None
    params, choice = operator
    facts = heat.describe(params, choice)
    spectra = {name: facts[f"spectrum/{name}"] for name in choice.names}
    width = len(next(iter(spectra.values())))
    rows = [
        {
            "name": charts.DIRECTIONS[name],
            "norm": float(facts[f"norm/{name}"]),
            "relative": float(facts[f"norm/{name}"]) / math.sqrt(width),
            "radius": float(np.abs(values).max()),
        }
        for name, values in spectra.items()
    ]
    return {
        "svg": charts.spectra(spectra, float(choice.propagator == "offset")),
        "offset": choice.propagator == "offset",
        "normalised": choice.norm != "none",
        "normalises_steps": choice.normalises_steps,
        "width": width,
        "rows": rows,
        "tied": choice.directions == "tied",
        "commutators": _by_sign(facts, "commutator/"),
        "correlations": {
            sign: {"size": float(np.linalg.norm(s)) / math.sqrt(width), "diagonal": float(np.trace(s)) / width}
            for sign, s in _by_sign(facts, "S/").items()
        },
        **_speeds(_by_sign(facts, "condition/"), _by_sign(facts, "speeds/")),
    }


def _speeds(conditions, speeds):
    """Return the chart and rows of the wave speeds: {"speeds_svg": SVG or None, "speeds": [{"sign", "condition", ...}]}."""
    rows = [
        {"sign": sign, "condition": condition, **heat.speed_figures(speeds.get(sign))}
        for sign, condition in conditions.items()
    ]
    groups = [(f"A{sign}, B{sign}", "learnt", sign == "+", values) for sign, values in speeds.items()]
    return {"speeds_svg": charts.speeds(groups, "waves") if groups else None, "speeds": rows}


def _by_sign(facts, prefix):
    """Return the entries PREFIX+ and PREFIX- of `heat.describe` as {sign: value}."""
    return {key[-1].replace("-", text.MINUS): value for key, value in facts.items() if key.startswith(prefix)}
