"""The recurrence against loops over every cell: from a centre, and from the border of a visible quarter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qbheat_jax.errors import UserError
from qbheat_jax.ops import autoregression, quarters
from qbheat_jax.ops import heat as heat_lib
from qbheat_jax.ops.heat import Heat
from qbheat_jax.train import config_tables
from tests.conftest import SMALL

WIDTH = 6
NINE = np.arange(9, dtype=np.int32)


def layer_norm(z):
    return (z - z.mean()) / np.sqrt(z.var() + 1e-6)


NORMS = {"layer": layer_norm, "none": lambda z: z}


def made(scale=0.6, seed=0):
    """Random matrices of the four directions."""
    draw = np.random.default_rng(seed)
    return {name: (scale * draw.normal(size=(WIDTH, WIDTH))).astype(np.float32) for name in ("x+", "x-", "y+", "y-")}


def by_paths(params, norm, known, height, width):
    """Every cell from the nearest of the `known` {(row, column): z}, along x first and along y first, averaged."""
    rows, columns = ([f(cell[k] for cell in known) for f in (min, max)] for k in (0, 1))

    def walk(z, axis, start, end):
        matrix = params[f"{axis}{'+' if end > start else '-'}"].astype(np.float64)
        for _ in range(abs(end - start)):
            z = z + matrix @ norm(z)
        return z

    grid = np.zeros((height, width, WIDTH))
    for i, j in np.ndindex(height, width):
        row, column = np.clip(i, *rows), np.clip(j, *columns)
        z = known[row, column].astype(np.float64)
        grid[i, j] += 0.5 * walk(walk(z, "x", column, j), "y", row, i)
        grid[i, j] += 0.5 * walk(walk(z, "y", row, i), "x", column, j)
    return grid


@pytest.mark.parametrize("height,width", [(4, 7), (1, 2)])
def test_a_map_grows_from_its_centre(height, width):
    params, vectors = made(), np.random.default_rng(1).normal(size=(2, WIDTH)).astype(np.float32)
    grid = jax.jit(autoregression.from_centre, static_argnums=(2, 3))(params, vectors, height, width)
    assert grid.shape == (2, height, width, WIDTH) and grid.dtype == jnp.float32
    for z, found in zip(vectors, grid):
        expected = by_paths(params, layer_norm, {(height // 2, width // 2): z}, height, width)
        np.testing.assert_allclose(found, expected, atol=2e-5)
    np.testing.assert_array_equal(grid[:, height // 2, width // 2], vectors)


@pytest.mark.parametrize("norm", NORMS)
def test_masked_quarters_grow_from_the_border_of_the_visible_one(norm):
    """All nine placements in one batch, on a grid of 4 x 8 cells; A and B are per half image."""
    heat, params = Heat("autoregressive", norm=norm), made()
    visible = np.random.default_rng(2).normal(size=(9, 2, 4, WIDTH)).astype(np.float32)
    grid = np.asarray(jax.jit(lambda p, v: heat_lib.extrapolate(p, heat, v, NINE))(params, visible))
    steps = {name: matrix / {"x": 4, "y": 2}[name[0]] for name, matrix in params.items()}
    for q in NINE:
        rows, columns = quarters.visible_slices(4, 8, int(q))
        known = {
            (rows.start + i, columns.start + j): visible[q, i, j] for i, j in np.ndindex(visible.shape[1:3])
        }  # fmt: skip
        np.testing.assert_allclose(grid[q], by_paths(steps, NORMS[norm], known, 4, 8), atol=2e-5)
        np.testing.assert_array_equal(grid[q, rows, columns], visible[q])
    few = heat_lib.extrapolate(params, heat, visible[[4, 0]], np.array([4, 0]), (0, 4))
    np.testing.assert_allclose(few, grid[[4, 0]], atol=1e-6)


def test_carrying_goes_cell_by_cell():
    params, z = made(), np.random.default_rng(3).normal(size=WIDTH).astype(np.float32)
    moved = z.astype(np.float64)
    for _ in range(3):
        moved = moved + params["x-"] / 4 @ layer_norm(moved)
    heat = Heat("autoregressive", norm="layer")
    np.testing.assert_allclose(heat_lib.carry(params, heat, z, "x", -0.75, 4), moved, atol=1e-5)
    # Without a norm it is `power`.
    linear, power = (heat_lib.carry(params, Heat(name), z, "y", 1.0, 4) for name in ("autoregressive", "power"))
    np.testing.assert_allclose(linear, power, rtol=1e-4)


def test_bfloat16_and_gradients():
    heat, params = Heat("autoregressive", norm="layer"), made(0.3)
    visible = jax.random.normal(jax.random.key(0), (2, 2, 2, WIDTH))

    @jax.jit
    def total(params, visible):
        return jnp.square(heat_lib.extrapolate(params, heat, visible, np.array([4, 4]), (4,))).mean()

    exact, (gradients, _) = jax.jit(jax.value_and_grad(total, (0, 1)))(params, visible)
    rounded = total(params, visible.astype(jnp.bfloat16))
    assert 1e-6 < abs(rounded - exact) < 2e-2 * exact
    for name, gradient in gradients.items():
        toward = np.random.default_rng(4).normal(size=gradient.shape).astype(np.float32)
        ends = [total({**params, name: params[name] + sign * 1e-2 * toward}, visible) for sign in (1, -1)]
        np.testing.assert_allclose((ends[0] - ends[1]) / 2e-2, (gradient * toward).sum(), rtol=2e-2)


def test_what_needs_a_matrix_is_refused():
    heat = Heat("autoregressive")
    with pytest.raises(ValueError, match="no matrix"):
        heat_lib.propagator(made(), heat, "x", 1.0, 4)
    with pytest.raises(ValueError, match="whole cells"):
        heat_lib.carry(made(), heat, np.zeros(WIDTH), "x", 0.5, 3)
    with pytest.raises(ValueError, match="cannot be shortened"):
        heat_lib.shortened(made(), heat, 0.5)
    with pytest.raises(ValueError, match="heat.directions='tied'"):
        Heat("autoregressive", "tied")
    with pytest.raises(UserError, match="heat.directions='tied'") as caught:
        config_tables.resolve({**SMALL, "heat.propagator": "autoregressive", "heat.directions": "tied"})
    assert caught.value.exit_code == 2
