"""Figures and a chart of the matrices A and B of a run."""

import math

import numpy as np

from qbheat_jax.ops import heat
from qbheat_jax.report import charts, text


def describe(params, config):
    """Return the figures and the chart of A and B as a dict, or None where the model has no heat operator.

    A propagator without A and B has no "rows", and nothing else but its name.
    """
    if not params:
        return None
    choice = heat.Heat(**config.heat.to_dict())
    if not choice.names:
        return {"rows": [], "propagator": choice.propagator}
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
        "width": width,
        "rows": rows,
        "tied": choice.directions == "tied",
        "commutators": _by_sign(facts, "commutator/"),
        "correlations": {
            sign: {"size": float(np.linalg.norm(s)) / math.sqrt(width), "diagonal": float(np.trace(s)) / width}
            for sign, s in _by_sign(facts, "S/").items()
        },
    }


def _by_sign(facts, prefix):
    """Return the entries PREFIX+ and PREFIX- of `heat.describe` as {sign: value}."""
    return {key[-1].replace("-", text.MINUS): value for key, value in facts.items() if key.startswith(prefix)}
