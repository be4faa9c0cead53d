"""Figures of A and B, learnt or fitted by least squares: spectra, growth, commutator, S, wave speeds, drift."""

import math

import numpy as np

from qbheat_jax.ops import heat

# Maps fitted over one cell are of this kind: P = I + A / n, n cells to half an image.
FITTED = heat.Heat("power")


def fitted(one_cell, cells):
    """Return {direction: A = n (P - I)} from {direction: P over one cell [K, K]} and cells {axis: n to half an image}."""
    return {name: cells[name[0]] * (p - np.eye(len(p))) for name, p in one_cell.items()}


def describe(params, choice, cells):
    """Return the figures of an operator as a JSON dict. `cells`: {axis: cells to half an image}.

    * "spectrum": {direction: [[re, im], ...]}, eigenvalues of A or B per half image.
    * "growth": {direction: factors along the eigenvectors over half an image, falling}; {} where each step normalises.
    * "norm": {direction: Frobenius norm over the root of the width}, 1 for the identity.
    * "commutator": {sign: value}.
    * "S": {sign: {"size", "diagonal" (mean), "spectrum"}} where B is not singular.
    * "speeds": {sign: {"condition", "values", "real", "median"}}: condition number of B (None: infinite), and of
      `heat.wave_speeds` where it allows them the speeds [[re, im], ...], the fraction that is real, the median |speed|.
    """
    known, result = heat.describe(params, choice), {"propagator": choice.propagator, "directions": choice.directions}
    width = len(known[f"spectrum/{choice.names[0]}"])
    result["spectrum"] = {name: _complex(known[f"spectrum/{name}"]) for name in choice.names}
    result["norm"] = {name: float(known[f"norm/{name}"]) / math.sqrt(width) for name in choice.names}
    result["growth"] = {}
    for name in choice.names if not choice.normalises_steps else ():
        growth = np.abs(_multipliers(known[f"spectrum/{name}"], choice, cells[name[0]]))
        result["growth"][name] = [_short(v) for v in np.sort(growth)[::-1]]
    result["commutator"] = {key[-1]: value for key, value in known.items() if key.startswith("commutator/")}
    result["S"] = {
        key[-1]: {
            "size": float(np.linalg.norm(s)) / math.sqrt(width),
            "diagonal": float(np.trace(s)) / width,
            "spectrum": _complex(np.linalg.eigvals(s)),
        }
        for key, s in known.items()
        if key.startswith("S/")
    }
    result["speeds"] = {}
    for sign in result["commutator"]:
        condition, speeds = known[f"condition/{sign}"], known.get(f"speeds/{sign}")
        result["speeds"][sign] = {"condition": _short(condition) if math.isfinite(condition) else None}
        if speeds is not None:
            result["speeds"][sign] |= {"values": _complex(speeds), **heat.speed_figures(speeds)}
    return result


def _multipliers(eigenvalues, choice, cells):
    """Return the eigenvalues of the propagator over half an image from those of its generator."""
    if choice.propagator == "offset":
        return 1 + eigenvalues
    if choice.by_cells:
        return (1 + eigenvalues / cells) ** cells
    return np.exp(eigenvalues)


def _complex(values):
    return [[_short(v.real), _short(v.imag)] for v in np.asarray(values, complex)]


def _short(value):
    """Round to seven digits, to keep the file small."""
    return float(f"{value:.7g}")


def drift(checkpoints, choice):
    """Return one row for each checkpoint and direction of [(step, heat params), ...], oldest first.

    "norm" is that of `describe`, "to_last" is ||A - A_last|| / ||A_last||, "radius" is the largest |eigenvalue|.
    """
    rows, last = [], {}
    for step, params in reversed(checkpoints):
        for name in choice.names:
            a = np.asarray(heat.generator(params, choice, name), np.float64)
            end = last.setdefault(name, a)
            size = np.linalg.norm(end)
            rows.append(
                {
                    "step": int(step),
                    "direction": name,
                    "norm": float(np.linalg.norm(a)) / math.sqrt(len(a)),
                    "to_last": float(np.linalg.norm(a - end) / size) if size else 0.0,
                    "radius": float(np.abs(np.linalg.eigvals(a)).max()),
                }
            )
    return sorted(rows, key=lambda row: (row["step"], row["direction"]))
