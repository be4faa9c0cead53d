"""The heat operator: linear maps, from z_x = A z and z_y = B z, that propagate features over a signed distance.

The steady heat equation z_xx + S z_yy = 0, with a learnt linear correlation S, holds if z_x = A z and z_y = B z with
S = -A^2 (B^2)^-1 (arXiv 2211.13228). Each equation makes the feature at a distance a linear map of the feature here. This
map, the propagator, is the same at every position. Four propagators are such maps over a distance d, in units of half an
image:

| name       | map                                | note                                                               |
|------------|------------------------------------|--------------------------------------------------------------------|
| `offset`   | I + d A                            | the paper's finite difference                                      |
| `power`    | (I + A / n)^(n d), n cells a half  | one finite difference a cell; by repeated squaring                 |
| `exp`      | expm(d A)                          | the exact solution of z_x = A z                                    |
| `spectral` | V diag(exp(d lambda)) V^-1         | one V for both axes, so A B = B A; complex pairs as real 2x2 blocks|

The fifth propagator, `autoregressive`, computes each masked cell from its immediate neighbour: z + (A / n) norm(z) per cell,
starting at the border of the visible block (`ops.autoregression`). It normalises at every step, so a layer norm makes it
FINOLA (arXiv 2305.16319). The four maps normalise once, before one product over the whole distance.

The sixth, `cosine`, has no A and B: it solves u_t = k Laplace(u) on the visible block and continues its cosine series (see
`cosine.py`). Only `init` and `extrapolate` take it.

Directions: `untied` learns one matrix for each of +x, -x, +y, -y, each over a positive distance. Mirroring the images then
swaps A+ and A-. `tied` learns +x and +y; a step back is the inverse of the step forward.

All functions are pure and take arrays and a params dict. Maps act on column vectors: z(x + d) = P z(x), which is `z @ P.T`
on the last axis. Propagators are float32 with full-precision products, because powers amplify rounding errors. Features
are multiplied in their own type (float32 at full precision, or bfloat16) and summed in float32.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from qbheat_jax.ops import autoregression, cosine, quarters
from qbheat_jax.ops.indexed_matmul import indexed_matmul

LINEAR_MAPS = ("offset", "power", "exp", "spectral")  # one matrix for a distance
PROPAGATORS = (*LINEAR_MAPS, "autoregressive", "cosine")
DIRECTIONS = ("untied", "tied")
NORMS = ("none", "layer")

# The largest condition number of B whose wave speeds are given: A and B are trained in float32, with 7 digits.
WORST_CONDITION = 1e6

_PRECISION = jax.lax.Precision.HIGHEST
_SQUARINGS = 16  # the most that `exponential` does


@dataclasses.dataclass(frozen=True)
class Heat:
    """Static choices. `init_scale` is the initial standard deviation of the entries of A and B, times sqrt(width)."""

    propagator: Literal["offset", "power", "exp", "spectral", "autoregressive", "cosine"] = "offset"
    directions: Literal["untied", "tied"] = "untied"
    norm: Literal["none", "layer"] = "none"
    init_scale: float = 0.0

    def __post_init__(self):
        for field, accepted in (("propagator", PROPAGATORS), ("directions", DIRECTIONS), ("norm", NORMS)):
            if getattr(self, field) not in accepted:
                raise ValueError(f"heat.{field}={getattr(self, field)!r} is not one of {', '.join(accepted)}")
        if self.propagator == "autoregressive" and self.directions == "tied":
            raise ValueError("heat.directions='tied' needs a step with an inverse, which 'autoregressive' has not")
        for field, default in self.fixed.items():
            if getattr(self, field) != default:
                raise ValueError(f"heat.propagator='cosine' has no A and B: heat.{field} must be {default!r}")

    @property
    def fixed(self):
        """{field: its default} of the fields that choose A and B, where the propagator has none; otherwise empty."""
        choices = {field.name: field.default for field in dataclasses.fields(self) if field.name != "propagator"}
        return choices if self.propagator == "cosine" else {}

    @property
    def names(self):
        """Names of the learnt directions; x runs along columns (A), y along rows (B). None for `cosine`."""
        if self.propagator == "cosine":
            return ()
        return ("x+", "y+") if self.directions == "tied" else ("x+", "x-", "y+", "y-")

    @property
    def by_cells(self):
        """Whether it moves by whole cells."""
        return self.propagator in ("power", "autoregressive")

    @property
    def shortens(self):
        """Whether steps can have any length. `cosine` mirrors cells."""
        return not self.by_cells and self.propagator != "cosine"

    @property
    def normalises_steps(self):
        """Whether z is normalised before the step of every cell, so that no matrix acts on z."""
        return self.propagator == "autoregressive" and self.norm != "none"


def init(rng, width, heat):
    """Return initial parameters for features of `width` channels; with init_scale 0 every propagator is the identity.

    Returns:
      For most: {"x+": float32 [C, C], ...}. For spectral: {"basis": [C, C], "x+": [C], ...}, where the vectors are read
      by `eigenvalues`. For cosine: those of `cosine.init`, which start near the identity in the first channels.
    """
    if heat.propagator == "cosine":
        return cosine.init(width)
    keys = dict(zip((*heat.names, "basis"), jax.random.split(rng, len(heat.names) + 1)))
    spectral = heat.propagator == "spectral"
    shape = (width,) if spectral else (width, width)
    scale = heat.init_scale / np.sqrt(width)
    params = {name: scale * jax.random.normal(keys[name], shape, jnp.float32) for name in heat.names}
    if spectral:  # an orthogonal basis has the best condition number
        params["basis"] = jax.random.orthogonal(keys["basis"], width).astype(jnp.float32)
    return params


def _product(a, b):
    return jnp.matmul(a, b, precision=_PRECISION)


def exponential(a):
    """Return expm(a) - I, using matrix products only.

    Taylor's polynomial of degree 9 is evaluated at a / 2^s, whose 1-norm is at most 3/4, and then squared s times. Libraries
    use scaled Pade approximants instead, which solve a linear system. Accelerators solve it column by column, and
    its gradient is slower on CPUs. Libraries also square expm(a / 2^s), and each squaring amplifies the rounding. Squaring
    the difference e from I avoids this: (I + e)^2 - I = 2 e + e^2.

    Args:
      a: float32 [C, C], of 1-norm up to 49,152 = 3/4 * 2^16.

    Returns:
      float32 [C, C]; NaN for larger norms.
    """
    norm = jax.lax.stop_gradient(jnp.abs(a).sum(0).max())
    squarings = jnp.maximum(jnp.ceil(jnp.log2(norm / 0.75)), 0.0)
    a = a * jnp.exp2(-squarings)
    c = 1.0 / np.cumprod(np.arange(1.0, 10.0), dtype=np.float32)  # 1 / 1! ... 1 / 9!
    eye = jnp.eye(a.shape[0], dtype=a.dtype)
    square = _product(a, a)
    cube = _product(square, a)
    e = c[5] * eye + c[6] * a + c[7] * square + c[8] * cube
    e = c[2] * eye + c[3] * a + c[4] * square + _product(cube, e)
    e = a + c[1] * square + _product(cube, e)

    def step(e, n):
        return jax.lax.cond(n < squarings, lambda e: 2.0 * e + _product(e, e), lambda e: e, e), None

    e, _ = jax.lax.scan(step, e, jnp.arange(_SQUARINGS))
    return jnp.where(squarings <= _SQUARINGS, e, jnp.nan)


def _pairs(width):
    """Return the number of complex pairs of `spectral`: half the channels hold pairs, the others real eigenvalues."""
    return width // 4


def eigenvalues(values):
    """Return the eigenvalues of a `spectral` vector.

    Args:
      values: float32 [C]: C - 2 * (C // 4) real eigenvalues, then C // 4 growths, then C // 4 frequencies.

    Returns:
      complex64 [C]: the real ones, then the conjugate pairs growth +- i frequency.
    """
    pairs = _pairs(values.shape[0])
    real, growth, frequency = jnp.split(values, [values.shape[0] - 2 * pairs, values.shape[0] - pairs])
    pair = growth + 1j * frequency
    return jnp.concatenate([real.astype(jnp.complex64), jnp.stack([pair, pair.conj()], 1).reshape(-1)])


def _block_diagonal(scale, pairs):
    """Return the real block-diagonal matrix [C, C] of complex `scale` [C].

    Real eigenvalues lie on the diagonal; each complex pair is a block [[re, -im], [im, re]].
    """
    alone = scale.shape[0] - 2 * pairs
    matrix = jnp.diag(scale.real)
    if pairs:
        first = alone + 2 * np.arange(pairs)
        imaginary = scale[first].imag
        matrix = matrix.at[first, first + 1].set(-imaginary).at[first + 1, first].set(imaginary)
    return matrix


def generator(params, heat, name):
    """Return the matrix A or B of a learnt direction as float32 [C, C]; `name` is one of `Heat.names`."""
    if heat.propagator != "spectral":
        return params[name]
    return _in_basis(params["basis"], eigenvalues(params[name]))


def _in_basis(basis, scale):
    """Return V diag(scale) V^-1 as a real matrix [C, C]."""
    right = _block_diagonal(scale, _pairs(basis.shape[0]))
    # X V = V D  <=>  V^T X^T = D^T V^T
    return jnp.linalg.solve(basis.T, _product(basis, right).T).T


def propagator(params, heat, axis, distance, cells):
    """Return the map P of z(. + distance) = P z(.) along an axis.

    Args:
      params: the parameters of `init`.
      heat: `Heat`.
      axis: "x" or "y".
      distance: signed float in half images, not 0.
      cells: n, the number of cells in half the image along the axis. Only `power` uses it, and needs n * distance to be
        a whole number.

    Returns:
      float32 [C, C].

    Raises:
      ValueError: `power` with a fractional number of cells; `autoregressive` and `cosine`, whose steps are no matrices.
    """
    if heat.propagator not in LINEAR_MAPS:
        raise ValueError(f"heat.propagator={heat.propagator!r} has no matrix over a distance")
    forward = distance > 0
    if heat.directions == "tied":
        name, steps, inverse = f"{axis}+", abs(distance), not forward
    else:
        name, steps, inverse = f"{axis}{'+' if forward else '-'}", abs(distance), False

    if heat.propagator == "spectral":
        values = eigenvalues(params[name])
        return _in_basis(params["basis"], jnp.exp((-steps if inverse else steps) * values))
    matrix = params[name]
    eye = jnp.eye(matrix.shape[0], dtype=jnp.float32)
    if heat.propagator == "exp":
        return eye + exponential((-steps if inverse else steps) * matrix)
    if heat.propagator == "offset":
        step = eye + steps * matrix
    else:
        with jax.default_matmul_precision("highest"):  # by repeated squaring
            step = jnp.linalg.matrix_power(eye + matrix / cells, _whole_cells(heat, distance, cells))
    return jnp.linalg.inv(step) if inverse else step


def _whole_cells(heat, distance, cells):
    """Return the number of cells in a distance. Raise ValueError where it is a fraction."""
    count = cells * abs(distance)
    if count != int(count):
        raise ValueError(
            f"heat.propagator={heat.propagator!r} takes whole cells: {distance} of a half of {cells} cells is {count}"
        )
    return int(count)


def _normalise(z, heat):
    """Return z, layer-normalised over the channels (no gain or bias) if `heat.norm` is "layer"."""
    return z if heat.norm == "none" else autoregression.layer_norm(z)


def carry(params, heat, z, axis, distance, cells):
    """Propagate features over a signed distance: z + (P - I) norm(z), or cell by cell if `autoregressive`.

    Args:
      params, heat, axis, distance, cells: as for `propagator`.
      z: float [..., C] of any float type.

    Returns:
      float32 [..., C].
    """
    z = z.astype(jnp.float32)
    if heat.propagator == "autoregressive":
        matrix = params[f"{axis}{'+' if distance > 0 else '-'}"] / cells
        count = _whole_cells(heat, distance, cells)
        return autoregression.line(z, matrix, count, functools.partial(_normalise, heat=heat))[-1]
    change = propagator(params, heat, axis, distance, cells) - jnp.eye(z.shape[-1], dtype=jnp.float32)
    return z + jnp.einsum("...c,dc->...d", _normalise(z, heat), change, precision=_PRECISION)


def shortened(params, heat, fraction):
    """Return parameters whose step over a distance d is the step of `params` over fraction * d.

    Raises:
      ValueError: the propagator has no shorter steps, see `Heat.shortens`.
    """
    if not heat.shortens:
        raise ValueError(f"heat.propagator={heat.propagator!r}: its steps cannot be shortened")
    return {name: value if name == "basis" else fraction * value for name, value in params.items()}


def _changes(params, heat, axis, steps, cells):
    """Return the fewest matrices that give every step, and how each step uses them.

    An untied offset scales with the distance, so one matrix per direction serves all steps. For the other propagators, a
    whole step is the square of a half step.

    Returns:
      (matrices float32 [K, C, C], {step: (k, weight)}) with P(step) - I = weight * matrices[k].
    """
    if heat.propagator == "offset" and heat.directions == "untied":
        signs = sorted({np.sign(d) for d in steps})
        matrices = [params[f"{axis}{'+' if sign > 0 else '-'}"] for sign in signs]
        return jnp.stack(matrices), {d: (signs.index(np.sign(d)), abs(d)) for d in steps}
    maps = {}
    for d in sorted(steps, key=abs):
        halves = d / 2 in maps and heat.propagator != "offset"
        maps[d] = _product(maps[d / 2], maps[d / 2]) if halves else propagator(params, heat, axis, d, cells)
    eye = jnp.eye(maps[steps[0]].shape[0], dtype=jnp.float32)
    return jnp.stack([maps[d] for d in steps]) - eye, {d: (k, 1.0) for k, d in enumerate(steps)}


def extrapolate(params, heat, visible, placement, placements=tuple(range(9))):
    """Fill the three masked quarters of the grid from the visible one: along x (columns), then along y (rows).

    Visible cells are returned unchanged. A masked cell is z + (P(d) - I) norm(z) of its source cell z; without a norm this
    is P(d) z. Each example, and each half of an example with a middle placement, needs its own steps: `indexed_matmul`
    selects their maps. A product with a 0/1 matrix puts the cells in their places. `cosine` is `cosine.extrapolate`.

    `autoregressive` grows the block from its border instead, and averages both orders of the axes.

    Args:
      params, heat: as for `propagator`.
      visible: float [B, h/2, w/2, C]. For bfloat16, the changes (P(d) - I) norm(z) are bfloat16 products, as in the encoder.
      placement: int32 [B], placement index of each example.
      placements: static tuple that contains every index in `placement`.

    Returns:
      float32 [B, h, w, C].
    """
    if heat.propagator == "cosine":
        return cosine.extrapolate(params, visible, placement, placements)
    dtype = jnp.bfloat16 if visible.dtype == jnp.bfloat16 else jnp.float32
    visible = visible.astype(jnp.float32)
    _, rows, columns, _ = visible.shape
    quarters.check_grid(2 * rows, 2 * columns, placements)
    if heat.propagator == "autoregressive":
        along = (functools.partial(_grow, params, heat, axis, placement, placements, dtype) for axis in "xy")
        return autoregression.both_orders(*along, visible)
    z = _fill(params, heat, "x", visible, placement, placements, dtype)
    return _fill(params, heat, "y", z.swapaxes(1, 2), placement, placements, dtype).swapaxes(1, 2)


def _fill(params, heat, axis, z, placement, placements, dtype):
    """Double the third axis: z float32 [B, other, n, C] -> [B, other, 2n, C], with products in `dtype`."""
    batch, others, cells, width = z.shape
    axis_index = "yx".index(axis)
    steps = quarters.steps(placements, axis_index)
    matrices, known = _changes(params, heat, axis, steps, cells)
    copied, carried = np.moveaxis(quarters.selection(2 * cells, placements, axis_index), 1, 0)  # [9, 2n, n]
    signed_steps = quarters.signed_steps(2 * cells, placements, axis_index)  # [9, parts]
    choice, weight = np.vectorize(lambda d: known.get(float(d), (0, 0.0)), otypes=(np.int32, np.float32))(signed_steps)
    parts = _normalise(z, heat).reshape(batch, others, signed_steps.shape[1], -1, width)
    change = indexed_matmul(parts.astype(dtype), matrices, jnp.asarray(choice)[placement])
    change = (change * jnp.asarray(weight)[placement][:, None, :, None, None]).reshape(z.shape)
    return _put(copied + carried, placement, z) + _put(carried, placement, change)


def _grow(params, heat, axis, placement, placements, dtype, z):
    """Double an axis of z float32 [B, h, w, C], cell by cell from the first and the last one.

    The block grows as far as any placement needs, then each example selects one of the few static windows.
    """
    index = "yx".index(axis)
    cells = z.shape[index + 1]
    starts = quarters.starts(2 * cells, index)  # [9], the first visible cell
    known = np.unique(starts[list(placements)])
    before, after = int(known.max()), int(cells - known.min())
    steps = {name: matrix / cells for name, matrix in params.items()}
    grown = autoregression.grow(steps, z, axis, before, after, functools.partial(_normalise, heat=heat), dtype)
    windows = [jax.lax.slice_in_dim(grown, before - s, before - s + 2 * cells, axis=index + 1) for s in known]
    own = jnp.asarray(starts)[placement][:, None, None, None]
    found = windows[0]
    for start, window in zip(known[1:], windows[1:]):
        found = jnp.where(own == start, window, found)
    return found


def _put(table, placement, z):
    """Place the cells z [B, other, n, C] by each example's 0/1 matrix in `table` [9, 2n, n] -> [B, other, 2n, C]."""
    return jnp.einsum("bij,brjc->bric", jnp.asarray(table)[placement], z, precision=_PRECISION)


def commutator(a, b):
    """Return ||A B - B A|| / (||A|| ||B||) in Frobenius norms; it is 0 iff z_xy = z_yx."""
    norms = jnp.linalg.norm(a) * jnp.linalg.norm(b)
    return jnp.where(
        norms > 0, jnp.linalg.norm(_product(a, b) - _product(b, a)) / jnp.where(norms > 0, norms, 1.0), 0.0
    )


def correlation(a, b):
    """Return S = -A^2 (B^2)^-1 of z_xx + S z_yy = 0 as float64 numpy [C, C].

    Raises:
      numpy.linalg.LinAlgError: B is singular.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return -np.linalg.solve((b @ b).T, (a @ a).T).T


def wave_speeds(a, b):
    """Return the speeds of the one-way wave equations that z_x = A norm(z) and z_y = B norm(z) imply, with any norm.

    Then z_x = A B^-1 z_y. With A B^-1 = V diag(lambda) V^-1 and zeta = V^-1 z this is zeta_x = lambda zeta_y for each
    channel, and the eigenvalues lambda are the speeds (arXiv 2310.12976).

    Returns:
      (complex128 [C], condition number of B in the 2-norm). The speeds are None where that number is above
      `WORST_CONDITION`: rounding errors of float32 matrices would decide them.

    >>> speeds, condition = wave_speeds(np.diag([1.0, 6.0]), np.diag([2.0, 2.0]))
    >>> speeds.real.tolist(), condition
    ([0.5, 3.0], 1.0)
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    values = np.linalg.svd(b, compute_uv=False)
    condition = float(values[0] / values[-1]) if values[-1] else np.inf
    if condition > WORST_CONDITION:
        return None, condition
    return np.linalg.eigvals(np.linalg.solve(b.T, a.T).T).astype(np.complex128), condition


def speed_figures(speeds):
    """Return {"real": fraction of the speeds complex [C] that is real, "median": of their absolute values}; {} of None."""
    if speeds is None:
        return {}
    return {"real": float(np.mean(speeds.imag == 0)), "median": float(np.median(np.abs(speeds)))}


def describe(params, heat):
    """Return figures of A and B for logs and reports.

    Returns:
      dict of numpy arrays. For each learnt direction: `spectrum/NAME` complex [C], eigenvalues per half image, and
      `norm/NAME`. For the sign + (and - if untied): `commutator/+`, `S/+` [C, C], and of `wave_speeds`
      `condition/+` and `speeds/+` complex [C]. S is absent where B is singular, as it is before the first step, and so are
      speeds that mean nothing. `cosine` has no figures.
    """
    result = {}
    for name in heat.names:
        matrix = np.asarray(generator(params, heat, name), np.float64)
        result[f"spectrum/{name}"] = np.linalg.eigvals(matrix)
        result[f"norm/{name}"] = np.linalg.norm(matrix)
    for sign in sorted({name[1] for name in heat.names}):
        a, b = generator(params, heat, f"x{sign}"), generator(params, heat, f"y{sign}")
        result[f"commutator/{sign}"] = float(commutator(a, b))
        try:
            result[f"S/{sign}"] = correlation(a, b)
        except np.linalg.LinAlgError:
            pass
        speeds, result[f"condition/{sign}"] = wave_speeds(a, b)
        if speeds is not None:
            result[f"speeds/{sign}"] = speeds
    return result
