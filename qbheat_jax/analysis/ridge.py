"""Ridge regression of linear maps, R^2 and its bootstrap interval, in numpy."""

import dataclasses

import numpy as np

# Ridge strengths over the mean variance of the source's channels. The largest shrinks a map to almost 0.
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
        """Return the Moments of centred x [N, pairs, C] and y [N, pairs, D], summed in float64 over blocks of images."""
        own, cross, size = np.zeros((x.shape[-1],) * 2), np.zeros((x.shape[-1], y.shape[-1])), 0.0
        for begin in range(0, len(x), _BLOCK):
            a, b = (v[begin : begin + _BLOCK].reshape(-1, v.shape[-1]) for v in (x, y))
            own, cross, size = own + a.T @ a, cross + a.T @ b, size + np.square(b).sum(dtype=np.float64)
        return cls(own, cross, size)

    def __add__(self, other):
        return Moments(self.own + other.own, self.cross + other.cross, self.size + other.size)


def fit(train, validation, dtype=np.float32):
    """Return (M [D, C] of y = M x, ridge strength), fitted on `train` and chosen on `validation`, both Moments."""
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
    """Return the squared error of each image, summed over pairs and channels: arrays [N, pairs, D] -> float64 [N]."""
    return np.square(predicted - target).sum((1, 2), dtype=np.float64)


def totals(target):
    """Return the total sum of squares of each image: centred targets [N, pairs, D] -> float64 [N].

    It is the error of predicting the mean map of the training images, which was subtracted from the targets.
    """
    return errors(0.0, target)


def explained(error, total, seed):
    """Return {"r2", "low", "high"} with R^2 = 1 - sum of errors / sum of totals, each [N] by image.

    low and high bound the 95 % bootstrap interval over images. Cells of one image are too alike to be resampled.
    """
    if not total.sum():
        return {"r2": 0.0, "low": 0.0, "high": 0.0}
    counts = np.random.default_rng(seed).multinomial(len(total), np.full(len(total), 1 / len(total)), _DRAWS)
    drawn = counts @ total
    r2 = 1 - (counts @ error)[drawn > 0] / drawn[drawn > 0]
    low, high = np.quantile(r2, (0.025, 0.975))
    return {"r2": float(1 - error.sum() / total.sum()), "low": float(low), "high": float(high)}
