"""The hypothesis, tested on maps of whole images: z_x = M z_y, and z(x + k) a linear map of z(x), the same everywhere.

All maps are departures from the mean map of the training images (`maps.departures`), so that neither the mean of the
features nor what the border of an image does to them counts for anything.
"""

from qbheat_jax.analysis import maps, ridge

# Distances, in cells, over which differences are taken.
_SPACINGS = (1, 2)


def derivatives(fields, seed):
    """z_x ~ M z_y and z_y ~ M z_x -> rows of figures.

    fields: {"train", "val", "test": [N, h, w, K]}; M is fitted on train, its ridge chosen on val, R^2 is of test.
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
    """z(x + k) from z(x) along both axes, both ways -> (rows of figures, {direction: the fitted map over one cell [K, K]}).

    fields as for `derivatives`. learnt(direction, k) -> what the learnt operator predicts of the test images, as departures
    [N, h, w, K] laid where the source cells are, or None. Beside it and the fitted map: copying z(x). All are
    measured against the mean map, which gets 0.
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
