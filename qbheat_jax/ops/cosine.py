"""The cosine propagator: let the visible block conduct heat behind insulated borders, and continue its cosine series.

vHeat solves u_t = k (u_xx + u_yy) on a rectangle with insulated borders, channel by channel, as a series of cosines (arXiv
2405.16555). Evaluated outside the rectangle, the series repeats it by mirror images. Here it is solved on the visible block.
A masked cell at the distance d from the block, in half images, takes the value of its mirror image in the block after the
time

    T_c(d) = k_c d + l_c d^2,    k, l >= 0 learnt for each channel c

so that cells near the block reflect it and far ones tend to its mean. The distance is the larger of those along both axes.
Lengths are in half images, thus parameters hold for every number of cells. This use of vHeat's operator is this project's:
vHeat does not extrapolate. Unlike A and B it mixes cells, and no channels.
"""

import jax
import jax.numpy as jnp
import numpy as np

from qbheat_jax.ops import quarters
from qbheat_jax.ops.heat_conduction import dct_matrix

# Initial times T(1) of the channels, first to last. Within the least, waves over two cells of a grid of 8 x 8 barely fade;
# within the most, nothing but the mean is left.
_TIMES = 1e-3, 1.0

_PRECISION = jax.lax.Precision.HIGHEST


def init(width):
    """Return initial parameters {"linear", "quadratic": float32 [C]}: times spread over the channels, evenly in logarithm."""
    half = jnp.geomspace(*_TIMES, width, dtype=jnp.float32) / 2
    raw = jnp.log(jnp.expm1(half))  # inverts softplus
    return {"linear": raw, "quadratic": raw}


def diffusion_time(params, distance):
    """Return the time T_c(d) of each channel as float32 [..., C]; distance: float [...] in half images, 0 or more."""
    distance = jnp.asarray(distance, jnp.float32)[..., None]
    return distance * (jax.nn.softplus(params["linear"]) + distance * jax.nn.softplus(params["quadratic"]))


def extrapolate(params, visible, placement, placements=tuple(range(9))):
    """Fill the three masked quarters of the grid from the visible one.

    Visible cells are returned unchanged. The map is linear in the features, and all of it is float32.

    Args:
      params: as of `init`.
      visible: float [B, h/2, w/2, C].
      placement: int32 [B], placement index of each example.
      placements: static tuple that contains every index in `placement`.

    Returns:
      float32 [B, h, w, C].
    """
    visible = visible.astype(jnp.float32)
    height, width = (2 * cells for cells in visible.shape[1:3])
    quarters.check_grid(height, width, placements)
    rows, columns = _axis(height, placements, 0), _axis(width, placements, 1)
    # The larger distance decides: rows fill the cells that are farther along y, columns the others.
    down, across = (2 * np.abs(steps) / steps.shape[1] for _, steps in (rows, columns))
    by_row = jnp.asarray(down[:, :, None] >= across[:, None, :])[placement]
    filled = _by_rows(params, visible, placement, rows, columns)
    other = _by_rows(params, visible.swapaxes(1, 2), placement, columns, rows).swapaxes(1, 2)
    return jnp.where(by_row[..., None], filled, other)


def _axis(cells, placements, axis):
    """Return the mirror image of each cell as a 0/1 table float32 [9, cells, cells // 2], and its step int32 [9, cells].

    Entries of other placements stay zero. Steps are in cells, see `quarters.reflections`.
    """
    mirror, steps = np.zeros((9, cells, cells // 2), np.float32), np.zeros((9, cells), np.int32)
    for q in placements:
        source, steps[q] = quarters.reflections(cells, quarters.split(int(q))[axis])
        mirror[q, np.arange(cells), source] = 1.0
    return mirror, steps


def _by_rows(params, visible, placement, rows, columns):
    """Return the grid [B, 2n, 2m, C] of visible [B, n, m, C] if only the distance along the rows' axis counted."""
    (mirror, steps), (across, _) = rows, columns
    count, width = visible.shape[1:3]
    reach = np.arange(1, np.abs(steps).max() + 1)
    reach = np.concatenate([reach, -reach])
    edge = np.where(reach > 0, count - reach, -reach - 1)  # the mirror image of the row that far from the block
    waves, others = dct_matrix(count), dct_matrix(width)
    time = diffusion_time(params, np.abs(reach) / count)  # [S, C]
    # Every row that some placement needs, each after its own time: from the spectrum back to cells.
    spectrum = _einsum("mx,bnxc->bnmc", others, _einsum("ny,byxc->bnxc", waves, visible))
    z = _einsum("nsc,bnmc->bsmc", waves[:, edge, None] * _fading(count, time), spectrum)
    z = _einsum("mx,bsmc->bsxc", others, z * _fading(width, time).swapaxes(0, 1))
    # Visible rows, then those; each example selects its own.
    table = np.zeros((*steps.shape, count + len(reach)), np.float32)
    table[..., :count] = np.where(steps[..., None] == 0, mirror, 0.0)
    table[..., count:] = steps[..., None] == reach
    z = _einsum("biy,byxc->bixc", jnp.asarray(table)[placement], jnp.concatenate([visible, z], 1))
    return _einsum("bjx,bixc->bijc", jnp.asarray(across)[placement], z)


def _fading(count, time):
    """Return exp(-(pi n)^2 time), the share of each wave that is left: time [S, C] -> [count, S, C]."""
    return jnp.exp(-jnp.square(jnp.pi * jnp.arange(count, dtype=jnp.float32))[:, None, None] * time)


def _einsum(subscripts, *arrays):
    return jnp.einsum(subscripts, *arrays, precision=_PRECISION)
