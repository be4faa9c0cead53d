"""A and B as numbers, the learnt ones and those that least squares fits: spectra, growth, commutator, S, drift."""

import math

import numpy as np

from qbheat_jax.ops import heat

# Maps fitted over one cell are an operator of this kind: P = I + A / n, n cells to half an image.
FITTED = heat.Heat("power")


def fitted(one_cell, cells):
    """{direction: map over one cell [K, K]}, cells {axis: n to half an image} -> {direction: A = n (P - I)}."""
    return {name: cells[name[0]] * (p - np.eye(len(p))) for name, p in one_cell.items()}


def describe(params, choice, cells):
    """What an operator is -> a dict of JSON.

    cells: {axis: cells to half an image}. "spectrum": {direction: [[re, im], ...]}, eigenvalues of A or B per half image;
    "growth": {direction: by how much the feature's part along each eigenvector is multiplied over half an image, falling};
    "norm" {direction: Frobenius, over the root of the width: of the identity 1}; by sign: "commutator", and "S" where B is
    not singular, {"size" (norm over the root of the width), "diagonal" (its mean), "spectrum"}.
    """
    known, result = heat.describe(params, choice), {"propagator": choice.propagator, "directions": choice.directions}
    width = len(known[f"spectrum/{choice.names[0]}"])
    result["spectrum"] = {name: _complex(known[f"spectrum/{name}"]) for name in choice.names}
    result["norm"] = {name: float(known[f"norm/{name}"]) / math.sqrt(width) for name in choice.names}
    for name in choice.names:
        growth = np.abs(_multipliers(known[f"spectrum/{name}"], choice, cells[name[0]]))
        result.setdefault("growth", {})[name] = [_short(v) for v in np.sort(growth)[::-1]]
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
    return result


def _multipliers(eigenvalues, choice, cells):
    """Eigenvalues of the propagator over half an image, from those of its generator."""
    if choice.propagator == "offset":
        return 1 + eigenvalues
    if choice.propagator == "power":
        return (1 + eigenvalues / cells) ** cells
    return np.exp(eigenvalues)


def _complex(values):
    return [[_short(v.real), _short(v.imag)] for v in np.asarray(values, complex)]


def _short(value):
    """Seven digits: there are many of them."""
    return float(f"{value:.7g}")


def drift(checkpoints, choice):
    """How the operator came about: [(step, heat params), ...], oldest first -> rows, one a checkpoint and direction.

    "norm": as of `describe`; "to_last": ||A - A of the last|| / ||A of the last||; "radius": largest |eigenvalue|.
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
