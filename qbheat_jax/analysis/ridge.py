"""Linear maps by least squares with a ridge, how much they explain, and how sure that is. numpy only."""

import dataclasses

import numpy as np

# Of the ridge, as shares of the mean variance of a source's channels; the largest leaves next to nothing of a map.
STRENGTHS = (1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)

_DRAWS, _BLOCK = 1000, 64


@dataclasses.dataclass(frozen=True)
class Moments:
    """Sums over pairs of cells (x, y): `own` of x x^T [C, C], `cross` of x y^T [C, D], `size` of |y|^2."""

    own: np.ndarray
    cross: np.ndarray
    size: float

    @classmethod
    def of(cls, x, y):
        """x [N, pairs, C], y [N, pairs, D], what has no mean any more; a few images at once, added in float64."""
        own, cross, size = np.zeros((x.shape[-1],) * 2), np.zeros((x.shape[-1], y.shape[-1])), 0.0
        for begin in range(0, len(x), _BLOCK):
            a, b = (v[begin : begin + _BLOCK].reshape(-1, v.shape[-1]) for v in (x, y))
            own, cross, size = own + a.T @ a, cross + a.T @ b, size + np.square(b).sum(dtype=np.float64)
        return cls(own, cross, size)

    def __add__(self, other):
        return Moments(self.own + other.own, self.cross + other.cross, self.size + other.size)


def fit(train, validation, dtype=np.float32):
    """(M, strength): the map y = M x [D, C] of least squares over `train`, its ridge best on `validation` (both Moments)."""
    variances, basis = np.linalg.eigh(train.own)
    variances = np.maximum(variances, 0.0)
    cross, own, other = basis.T @ train.cross, basis.T @ validation.own @ basis, basis.T @ validation.cross
    scale = max(variances.mean(), np.finfo(np.float64).tiny)
    best = None
    for strength in STRENGTHS:
        m = cross / (variances + strength * scale)[:, None]
        error = validation.size - 2 * (m * other).sum() + (m * (own @ m)).sum()
        if best is None or error < best[0]:
            best = error, strength, m
    return (basis @ best[2]).T.astype(dtype), best[1]


def errors(predicted, target):
    """Squared error of each image, float64 [N]: both [N, pairs, D]."""
    return np.square(predicted - target).sum((1, 2), dtype=np.float64)


def totals(target):
    """The error of the guess that nothing departs from the mean map of the training images: [N, pairs, D] -> float64 [N]."""
    return errors(0.0, target)


def explained(error, total, seed):
    """R^2 = 1 - sum of errors / sum of totals (each [N], by image) -> {"r2", "low", "high"}.

    low, high: the 95 % bootstrap interval, from images drawn anew with replacement, not cells: those of one image are alike.
    """
    if not total.sum():
        return {"r2": 0.0, "low": 0.0, "high": 0.0}
    counts = np.random.default_rng(seed).multinomial(len(total), np.full(len(total), 1 / len(total)), _DRAWS)
    drawn = counts @ total
    r2 = 1 - (counts @ error)[drawn > 0] / drawn[drawn > 0]
    low, high = np.quantile(r2, (0.025, 0.975))
    return {"r2": float(1 - error.sum() / total.sum()), "low": float(low), "high": float(high)}
