"""The heat operator: linear maps from z_x = A z, z_y = B z that carry features over a signed distance.

The steady heat equation with the isotropic Laplacian made a linear correlation, z_xx + S z_yy = 0, is satisfied by
z_x = A z and z_y = B z with S = -A^2 (B^2)^-1 (arXiv 2211.13228). By either equation the feature at a distance is a
linear map, the propagator, of the feature here, and the map is the same at every position. Four propagators, over a
distance d in units of half an image:

| name       | map                                | note                                                               |
|------------|------------------------------------|--------------------------------------------------------------------|
| `offset`   | I + d A                            | the paper's finite difference                                      |
| `power`    | (I + A / n)^(n d), n cells a half  | one finite difference a cell; by repeated squaring                 |
| `exp`      | expm(d A)                          | the exact solution of z_x = A z                                    |
| `spectral` | V diag(exp(d lambda)) V^-1         | one V for both axes, so A B = B A; complex pairs as real 2x2 blocks|

Directions: `untied` learns a matrix for each of +x, -x, +y, -y, each over a positive distance, so that flipping the
images swaps A+ and A-; `tied` learns +x and +y, and a step back is the inverse of the step forward.

Pure functions of arrays and a params dict. Maps act on column vectors: z(x + d) = P z(x), `z @ P.T` on the last axis.
Propagators are float32, their products at full precision: they are powers, and errors would be raised with them. What they
are applied to is multiplied in its own type, float32 at full precision or bfloat16, and summed in float32.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from qbheat_jax.ops import quarters
from qbheat_jax.ops.indexed_matmul import chosen_product

PROPAGATORS = ("offset", "power", "exp", "spectral")
DIRECTIONS = ("untied", "tied")
NORMS = ("none", "layer")

_PRECISION = jax.lax.Precision.HIGHEST
_SQUARINGS = 16  # at most, in `exponential`


@dataclasses.dataclass(frozen=True)
class Heat:
    """Static choices. `init_scale` is the standard deviation of the entries of A, B at the start, times sqrt(width)."""

    propagator: Literal["offset", "power", "exp", "spectral"] = "offset"
    directions: Literal["untied", "tied"] = "untied"
    norm: Literal["none", "layer"] = "none"
    init_scale: float = 0.0

    def __post_init__(self):
        for field, accepted in (("propagator", PROPAGATORS), ("directions", DIRECTIONS), ("norm", NORMS)):
            if getattr(self, field) not in accepted:
                raise ValueError(f"heat.{field}={getattr(self, field)!r} is not one of {', '.join(accepted)}")

    @property
    def names(self):
        """The learnt directions: x is along columns (A), y along rows (B)."""
        return ("x+", "y+") if self.directions == "tied" else ("x+", "x-", "y+", "y-")


def init(rng, width, heat):
    """Parameters for features of `width` channels; with init_scale 0 every propagator is the identity.

    offset, power, exp: {"x+": [C, C], ...}. spectral: {"basis": [C, C], "x+": [C], ...}, see `eigenvalues`.
    """
    keys = dict(zip((*heat.names, "basis"), jax.random.split(rng, len(heat.names) + 1)))
    spectral = heat.propagator == "spectral"
    shape = (width,) if spectral else (width, width)
    scale = heat.init_scale / np.sqrt(width)
    params = {name: scale * jax.random.normal(keys[name], shape, jnp.float32) for name in heat.names}
    if spectral:  # orthogonal, hence as well conditioned as can be
        params["basis"] = jax.random.orthogonal(keys["basis"], width).astype(jnp.float32)
    return params


def _product(a, b):
    return jnp.matmul(a, b, precision=_PRECISION)


def exponential(a):
    """expm(a) - I, a float32 [C, C] of 1-norm up to 49,152 = 3/4 * 2^16; beyond that NaN.

    By products alone: Taylor's polynomial of degree 9 of a / 2^s, of 1-norm 3/4 at most, then s squarings. The method that
    libraries take (scaled Pade approximants) solves a linear system, which accelerators do one column after the other and
    whose gradient takes a CPU longer; and they square expm(a / 2^s), whose rounding grows with each squaring,
    where this squares what it differs from I by: (I + e)^2 - I = 2 e + e^2.
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
    """How many complex pairs `spectral` holds: they take half the channels, real eigenvalues take the others."""
    return width // 4


def eigenvalues(values):
    """float32[C] of `spectral` -> complex64[C]: the first C - 2 * (C // 4) are real, then growths, then frequencies."""
    pairs = _pairs(values.shape[0])
    real, growth, frequency = jnp.split(values, [values.shape[0] - 2 * pairs, values.shape[0] - pairs])
    pair = growth + 1j * frequency
    return jnp.concatenate([real.astype(jnp.complex64), jnp.stack([pair, pair.conj()], 1).reshape(-1)])


def _block_diagonal(scale, pairs):
    """Real [C, C]: diag of the real parts, then [[re, -im], [im, re]] for every complex pair. `scale` complex[C]."""
    alone = scale.shape[0] - 2 * pairs
    matrix = jnp.diag(scale.real)
    if pairs:
        first = alone + 2 * np.arange(pairs)
        imaginary = scale[first].imag
        matrix = matrix.at[first, first + 1].set(-imaginary).at[first + 1, first].set(imaginary)
    return matrix


def generator(params, heat, name):
    """The matrix A (or B) of one learnt direction, `name` as in `Heat.names` -> float32 [C, C]."""
    if heat.propagator != "spectral":
        return params[name]
    return _in_basis(params["basis"], eigenvalues(params[name]))


def _in_basis(basis, scale):
    """V diag(scale) V^-1, real."""
    right = _block_diagonal(scale, _pairs(basis.shape[0]))
    # X V = V D  <=>  V^T X^T = D^T V^T
    return jnp.linalg.solve(basis.T, _product(basis, right).T).T


def propagator(params, heat, axis, distance, cells):
    """The map P of z(. + distance) = P z(.) along an axis -> float32 [C, C].

    axis: "x" or "y". distance: signed, in half images, not 0. cells: n, the cells of half the image along the axis,
    which only `power` uses; it needs n * distance to be whole.
    """
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
        count = cells * steps
        if count != int(count):
            raise ValueError(
                f"power takes whole cells, but {distance} of a half of {cells} cells is {cells * distance}"
            )
        with jax.default_matmul_precision("highest"):
            step = jnp.linalg.matrix_power(eye + matrix / cells, int(count))  # by repeated squaring
    return jnp.linalg.inv(step) if inverse else step


def _normalise(z, heat):
    """z, or its layer norm without gain and bias over the channels (`norm: layer`)."""
    if heat.norm == "none":
        return z
    mean, variance = z.mean(-1, keepdims=True), z.var(-1, keepdims=True)
    return (z - mean) * jax.lax.rsqrt(variance + 1e-6)


def carry(params, heat, z, axis, distance, cells):
    """Features z [..., C], any float type, carried over a signed distance: z + (P - I) norm(z) -> float32 [..., C].

    axis, distance, cells: as of `propagator`.
    """
    z = z.astype(jnp.float32)
    change = propagator(params, heat, axis, distance, cells) - jnp.eye(z.shape[-1], dtype=jnp.float32)
    return z + jnp.einsum("...c,dc->...d", _normalise(z, heat), change, precision=_PRECISION)


def shortened(params, heat, share):
    """Parameters whose step over any distance d is that of `params` over share * d. Not of `power`, which takes whole cells."""
    if heat.propagator == "power":
        raise ValueError("power takes whole cells: its steps cannot be shortened")
    return {name: value if name == "basis" else share * value for name, value in params.items()}


def _changes(params, heat, axis, steps, cells):
    """(matrices float32 [K, C, C], {step: (k, weight)}) with P(step) - I = weight * matrices[k].

    As few matrices, and as little work for them, as will do. An untied offset changes in proportion to the distance, so that
    one matrix a direction serves all steps. Of all propagators but the offset a whole step is two halves.
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


def extrapolate(params, heat, visible, quarter, placements=tuple(range(9))):
    """Fills the three masked quarters of the grid from the visible one: along x (columns), then along y (rows).

    visible [B, h/2, w/2, C], any float type; quarter int32[B], placement index of each example, each in the static
    tuple `placements` -> float32 [B, h, w, C]. The visible cells come back as they were; a masked one is
    z + (P(d) - I) norm(z) of the visible cell z it comes from, which is P(d) z where there is no norm.

    Examples differ in the steps they need, and the halves of an example in the middle do: see `chosen_product` for how each
    gets its map. Cells are put in their places by a small 0/1 product. Of bfloat16 features the changes (P(d) - I) norm(z) are
    products of bfloat16, as those of the encoder are that they come from.
    """
    dtype = jnp.bfloat16 if visible.dtype == jnp.bfloat16 else jnp.float32
    visible = visible.astype(jnp.float32)
    _, rows, columns, _ = visible.shape
    quarters.check_grid(2 * rows, 2 * columns, placements)
    z = _fill(params, heat, "x", visible, quarter, placements, dtype)
    return _fill(params, heat, "y", z.swapaxes(1, 2), quarter, placements, dtype).swapaxes(1, 2)


def _fill(params, heat, axis, z, quarter, placements, dtype):
    """Doubles the third dimension: z float32 [B, other, n, C] -> [B, other, 2n, C], multiplied as `dtype`."""
    batch, others, cells, width = z.shape
    quarters_axis = "yx".index(axis)
    steps = quarters.steps(placements, quarters_axis)
    matrices, known = _changes(params, heat, axis, steps, cells)
    copied, carried = np.moveaxis(quarters.selection(2 * cells, placements, quarters_axis), 1, 0)  # [9, 2n, n]
    signed_steps = quarters.signed_steps(2 * cells, placements, quarters_axis)  # [9, parts]
    choice, weight = np.vectorize(lambda d: known.get(float(d), (0, 0.0)), otypes=(np.int32, np.float32))(signed_steps)
    parts = _normalise(z, heat).reshape(batch, others, signed_steps.shape[1], -1, width)
    change = chosen_product(parts.astype(dtype), matrices, jnp.asarray(choice)[quarter])
    change = (change * jnp.asarray(weight)[quarter][:, None, :, None, None]).reshape(z.shape)
    return _put(copied + carried, quarter, z) + _put(carried, quarter, change)


def _put(table, quarter, z):
    """z [B, other, n, C] put in the places that the 0/1 table [9, 2n, n] has for each example's quarter."""
    return jnp.einsum("bij,brjc->bric", jnp.asarray(table)[quarter], z, precision=_PRECISION)


def commutator(a, b):
    """||A B - B A|| / (||A|| ||B||), Frobenius norms; 0 iff both orders of differentiation agree (z_xy = z_yx)."""
    norms = jnp.linalg.norm(a) * jnp.linalg.norm(b)
    return jnp.where(
        norms > 0, jnp.linalg.norm(_product(a, b) - _product(b, a)) / jnp.where(norms > 0, norms, 1.0), 0.0
    )


def correlation(a, b):
    """S = -A^2 (B^2)^-1 of z_xx + S z_yy = 0 -> [C, C], as float64 numpy. Raises LinAlgError where B is singular."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return -np.linalg.solve((b @ b).T, (a @ a).T).T


def describe(params, heat):
    """What A and B are, for logs and reports -> dict of numpy arrays.

    For each learnt direction `spectrum/NAME` complex[C] (eigenvalues per half image) and `norm/NAME`; `commutator/+` and
    (untied) `commutator/-`; `S/+` [C, C], absent where B is singular, as it is before the first step.
    """
    result = {}
    for name in heat.names:
        matrix = np.asarray(generator(params, heat, name), np.float64)
        result[f"spectrum/{name}"] = np.linalg.eigvals(matrix)
        result[f"norm/{name}"] = np.linalg.norm(matrix)
    for sign in ("+",) if heat.directions == "tied" else ("+", "-"):
        a, b = generator(params, heat, f"x{sign}"), generator(params, heat, f"y{sign}")
        result[f"commutator/{sign}"] = float(commutator(a, b))
        try:
            result[f"S/{sign}"] = correlation(a, b)
        except np.linalg.LinAlgError:
            pass
    return result
