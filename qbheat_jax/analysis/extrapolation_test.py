"""Test the extrapolation: predict the map of a whole image from its visible quarter encoded alone."""

import dataclasses

import numpy as np

from qbheat_jax.analysis import continuations, maps, ridge
from qbheat_jax.ops import quarters

# Parts of the grid with figures, beside each direction and distance.
PARTS = ("visible", "diagonal", "hidden")


@dataclasses.dataclass(frozen=True)
class Placement:
    """The source of each cell of the grid under one placement.

    Attributes:
      rows, columns: int32 [h], int32 [w], the visible source cell.
      steps: float32 [h, w, 2], the distance from it to the right and down, in half images.
    """

    rows: np.ndarray
    columns: np.ndarray
    steps: np.ndarray

    @classmethod
    def of(cls, height, width, quarter):
        (rows, down), (columns, right) = (
            quarters.sources(n, place) for n, place in zip((height, width), quarters.split(quarter))
        )
        return cls(rows, columns, np.stack(np.broadcast_arrays(right[None, :], down[:, None]), -1))

    def copied(self, visible):
        """Return the grid with each cell a copy of its source: [N, h/2, w/2, C] -> [N, h, w, C]."""
        return visible[:, self.rows][:, :, self.columns]

    def cells(self, part):
        """Return a mask bool [h, w] of a part: one of PARTS, or the cells a step (axis, signed distance) away."""
        right, down = self.steps[..., 0], self.steps[..., 1]
        if part == "hidden":
            return (right != 0) | (down != 0)
        if part == "visible":
            return (right == 0) & (down == 0)
        if part == "diagonal":
            return (right != 0) & (down != 0)
        axis, distance = part
        return (right == (distance if axis == "x" else 0)) & (down == (distance if axis == "y" else 0))


def whole_steps(placements):
    """Return [(axis, signed distance), ...] that some placement needs."""
    return [(axis, d) for axis, along in (("x", 1), ("y", 0)) for d in quarters.steps(placements, along)]


class ExtrapolationTest:
    """Grids extrapolated from quarters by copying, by fitted maps, by the learnt operator and by `continuations`.

    All grids are departures from the mean over the training images at the same cell under the same placement, so each
    predictor is given the mean map.

    Args:
      whole: {role: [N, h, w, C]}.
      quarter_maps: {placement: {role: [N, h/2, w/2, C]}}.
      basis: as in `maps.departures`.
      learnt: function (visible [N, h/2, w/2, C], placement) -> [N, h, w, C], or None.
    """

    def __init__(self, whole, quarter_maps, basis=None, learnt=None):
        height, width = whole["train"].shape[1:3]
        self.placements = {q: Placement.of(height, width, q) for q in quarter_maps}
        self.target = maps.departures(whole, basis)
        visible = {q: maps.departures(parts, basis) for q, parts in quarter_maps.items()}
        self._copied = {
            q: {role: self.placements[q].copied(z) for role, z in parts.items()} for q, parts in visible.items()
        }
        self._continued = {
            name: {q: getattr(continuations, name)(parts["test"], q) for q, parts in visible.items()}
            for name in ("mirror", "border", "mean")
        }
        self._continued["cosine"] = continuations.cosine(visible, self.target)
        self._fitted = self._fit()
        self._learnt = {}
        if learnt is not None:
            for q, parts in quarter_maps.items():
                made = {role: learnt(parts[role], q) for role in ("train", "test")}
                self._learnt[q] = maps.departures(made, basis)["test"]

    def _fit(self):
        """Return {(axis, distance): (map [K, K], ridge strength)}, each fitted over all placements with this step."""
        fitted = {}
        for step in whole_steps(self.placements):
            moments = {}
            for role in ("train", "val"):
                parts = [
                    ridge.Moments.of(self._copied[q][role][:, cells], self.target[role][:, cells])
                    for q, placement in self.placements.items()
                    if (cells := placement.cells(step)).any()
                ]
                moments[role] = sum(parts[1:], parts[0])
            fitted[step] = ridge.fit(moments["train"], moments["val"])
        return fitted

    @property
    def predictors(self):
        """Names of the predictors that have pictures; `rows` has also those of `continuations`."""
        return ("learnt", "fitted", "copy") if self._learnt else ("fitted", "copy")

    def grid(self, predictor, quarter):
        """Return a predictor's grids of the test images, [N, h, w, K], those of maps with visible cells unchanged."""
        if predictor == "learnt":
            return self._learnt[quarter]
        if predictor in self._continued:
            return self._continued[predictor][quarter]
        made = self._copied[quarter]["test"]
        if predictor == "copy":
            return made
        made, steps = made.copy(), self.placements[quarter].steps
        for along, axis in enumerate("xy"):
            for (a, distance), (m, _) in self._fitted.items():
                if a == axis:
                    cells = steps[..., along] == distance
                    made[:, cells] = made[:, cells] @ m.T
        return made

    def rows(self, seed):
        """Return rows of figures for each predictor by direction and distance, on the diagonal and on all hidden cells.

        Copying on the visible cells compares the quarter encoded alone and within the whole.
        """
        rows, target = [], self.target["test"]
        for part in (*whole_steps(self.placements), *PARTS):
            where = [(q, cells) for q, p in self.placements.items() if (cells := p.cells(part)).any()]
            total = sum(ridge.totals(target[:, cells]) for _, cells in where)
            for predictor in ("copy",) if part == "visible" else (*self.predictors, *continuations.NAMES):
                error = sum(ridge.errors(self.grid(predictor, q)[:, cells], target[:, cells]) for q, cells in where)
                single = not isinstance(part, str)
                rows.append(
                    {
                        "test": "quarter",
                        "predictor": predictor,
                        "direction": f"{part[0]}{'+' if part[1] > 0 else '-'}" if single else part,
                        "distance": abs(part[1]) if single else None,
                        **ridge.explained(error, total, seed),
                        "ridge": self._fitted[part][1] if single and predictor == "fitted" else None,
                    }
                )
        return rows
