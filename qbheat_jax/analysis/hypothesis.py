"""Test the hypothesis on maps of whole images: z_x = M z_y, and z(x + k) is a linear map of z(x), the same everywhere.

Maps are departures from the mean map of the training images (`maps.departures`), so neither the mean feature nor the border
of images counts.
"""

from qbheat_jax.analysis import maps, ridge

# Spacings of differences in cells.
_SPACINGS = (1, 2)


def derivatives(fields, seed):
    """Return rows of figures for z_x ~ M z_y and z_y ~ M z_x.

    fields: {"train", "val", "test": [N, h, w, K]}. M is fitted on train, its ridge chosen on val, R^2 measured on test.
    """
    rows, (height, width) = [], fields["train"].shape[1:3]
    for spacing in (s for s in _SPACINGS if 2 * s < min(height, width)):
        pairs = {role: maps.differences(z, spacing) for role, z in fields.items()}
        for name, target, source in (("z_x ~ M z_y", 0, 1), ("z_y ~ M z_x", 1, 0)):
            moments = {role: ridge.Moments.of(p[source], p[target]) for role, p in pairs.items() if role != "test"}
            m, strength = ridge.fit(moments["train"], moments["val"], fields["train"].dtype)
            x, y = pairs["test"][source], pairs["test"][target]
            figures = ridge.explained(ridge.errors(x @ m.T, y), ridge.totals(y), seed)
            rows.append(_row("derivatives", "fitted", name, spacing, figures, strength))
    return rows


def steps(fields, seed, learnt=None):
    """Predict z(x + k) from z(x) along both axes, both ways, by a fitted map, by copying and by the learnt operator.

    Args:
      fields: as in `derivatives`.
      seed: of the bootstrap.
      learnt: function (direction, k) -> the learnt operator's predictions for the test images, departures [N, h, w, K] at
        the source cells; or None.

    Returns:
      (rows of figures, {direction: the fitted map over one cell [K, K]}). The mean map has R^2 = 0.
    """
    rows, one_cell = [], {}
    for direction in maps.DIRECTIONS:
        for k in maps.distances(fields["train"].shape[1 if direction[0] == "y" else 2]):
            pairs = {role: maps.ends(z, direction, k) for role, z in fields.items()}
            m, strength = ridge.fit(
                *(ridge.Moments.of(*pairs[role]) for role in ("train", "val")), fields["train"].dtype
            )
            if k == 1:
                one_cell[direction] = m
            here, there = pairs["test"]
            guesses = {"fitted": here @ m.T, "copy": here}
            if learnt is not None:
                guesses["learnt"] = maps.ends(learnt(direction, k), direction, k)[0]
            total = ridge.totals(there)
            for name, guess in guesses.items():
                figures = ridge.explained(ridge.errors(guess, there), total, seed)
                rows.append(_row("step", name, direction, k, figures, strength if name == "fitted" else None))
    return rows, one_cell


def _row(test, predictor, direction, distance, figures, strength=None):
    row = {"test": test, "predictor": predictor, "direction": direction, "distance": distance, **figures}
    return {**row, "ridge": strength}
