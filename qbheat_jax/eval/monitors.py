"""Label-free monitors of features: RankMe, alpha-ReQ and LiDAR, in float64 on the host.

They take the features of a few hundred images or more and need no labels. Each returns None where it is undefined, such as
for features that are not finite.
"""

import numpy as np

# Names of the monitors, and how pages write them.
TITLES = {"rankme": "RankMe", "lidar": "LiDAR", "alpha_req": "\u03b1-ReQ"}

# Eigenvalues that alpha-ReQ's line is fitted to, counted from 1. The first few do not follow the power law, and the last
# of many come from the sample.
_FIRST, _LAST = 3, 100
# Eigenvalues below this share of the largest are rounding errors of float32 features.
_ROUNDING = 1e-9
# What LiDAR adds to the within-class variance of every direction, relative to its mean over the directions.
_REGULAR = 1e-4


def rankme(features):
    """Return RankMe (Garrido et al., arXiv 2210.02885), the effective rank of features [N, C], from 1 to min(N, C).

    It is the exponential of the entropy of the singular values, divided by their sum. Features are not centred.

    >>> rankme(np.eye(4)), rankme(np.ones((4, 4)))
    (4.0, 1.0)
    """
    features = np.asarray(features, np.float64)
    if not np.isfinite(features).all():
        return None
    return _effective_rank(np.linalg.svd(features, compute_uv=False))


def alpha_req(features):
    """Return alpha-ReQ (Agrawal et al., NeurIPS 2022): the exponent of the power law of the covariance's eigenvalues.

    Eigenvalue j of features [N, C] is close to c / j^alpha. The line of log eigenvalue over log j is fitted from the third
    to the hundredth eigenvalue, with weights 1 / j, so that each octave counts alike. A collapse of dimensions makes alpha
    large; best features have about 1.
    """
    features = np.asarray(features, np.float64)
    if not np.isfinite(features).all():
        return None
    variances = np.linalg.svd(features - features.mean(0), compute_uv=False) ** 2
    variances = variances[variances > _ROUNDING * variances.max(initial=0.0)][:_LAST]
    if len(variances) < _FIRST + 2:
        return None
    place = np.arange(_FIRST, 1 + len(variances), dtype=np.float64)
    slope, _ = np.polyfit(np.log(place), np.log(variances[_FIRST - 1 :]), 1, w=place**-0.5)
    return float(-slope)


def lidar(views):
    """Return LiDAR (Thilak et al., arXiv 2312.04000), the effective rank of a linear discriminant analysis.

    Every image is a class, and its augmented views are the class's examples. LiDAR is the effective rank of
    W^-1/2 B W^-1/2, B being the covariance of the images' means and W the mean covariance of their views. It counts the
    directions that differ between images and not between views of one, from 1 to min(n - 1, C).

    The diagonal of W grows by 1e-4 of its mean. (The paper adds 1e-4 itself, which depends on the features' scale.)

    Args:
      views: Features [n, views, C] of at least two views of each image.
    """
    views = np.asarray(views, np.float64)
    if not np.isfinite(views).all() or views.shape[0] < 2 or views.shape[1] < 2:
        return None
    means = views.mean(1)
    within = (views - means[:, None]).reshape(-1, views.shape[-1])
    within = within.T @ within / len(within)
    size = np.trace(within) / len(within)
    if not size:
        return None
    values, vectors = np.linalg.eigh(within + _REGULAR * size * np.eye(len(within)))
    return _effective_rank(np.linalg.svd((means - means.mean(0)) @ (vectors / np.sqrt(values)), compute_uv=False) ** 2)


def _effective_rank(values):
    """Return exp(entropy) of non-negative values over their sum; 0 where all are 0."""
    share = values[values > 0] / max(values.sum(), np.finfo(np.float64).tiny)
    return float(np.exp(-(share * np.log(share)).sum())) if len(share) else 0.0


def spearman(x, y):
    """Return Spearman's rank correlation of x and y [N], ties at their mean rank; None where one of them is constant.

    >>> spearman([1, 2, 3, 4], [10, 20, 40, 30])
    0.8
    """
    x, y = (_ranks(np.asarray(values, np.float64)) for values in (x, y))
    if not (x.std() and y.std()):
        return None
    return round(float(np.corrcoef(x, y)[0, 1]), 12)


def _ranks(values):
    """Return the rank of each value from 0, equal values at their mean rank, float64 [N]."""
    return (values[:, None] > values).sum(1) + ((values[:, None] == values).sum(1) - 1) / 2
