"""The cosine propagator against the series of cosines evaluated at every cell, its limits, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qbheat_jax.errors import UserError
from qbheat_jax.ops import cosine, heat, quarters
from qbheat_jax.train import config_tables

ROWS, COLUMNS, WIDTH = 2, 4, 3  # of the visible block
NINE = np.arange(9, dtype=np.int32)

extrapolate = jax.jit(cosine.extrapolate, static_argnums=3)


def random_visible(seed=0, batch=9, rows=ROWS, columns=COLUMNS):
    return jax.random.normal(jax.random.key(seed), (batch, rows, columns, WIDTH))


def params_of(linear, quadratic):
    """Params of times linear * d + quadratic * d^2, for all channels or each."""
    given = {"linear": linear, "quadratic": quadratic}
    return {name: jnp.log(jnp.expm1(jnp.broadcast_to(jnp.float32(value), WIDTH))) for name, value in given.items()}


def filled(params, visible):
    return np.asarray(extrapolate(params, visible, NINE))


def hidden(q):
    return quarters.masked(2 * ROWS, 2 * COLUMNS)[q]


def position(placement):
    """Return (y, x, d) of each cell of the grid: its centre from the block's corner and its distance, in half images."""
    (y, down), (x, across) = (
        ((i + 0.5) / count, np.maximum(0, np.maximum(-i, i - count + 1)) / count)
        for count, place in zip((ROWS, COLUMNS), quarters.split(placement))
        for i in [np.arange(2 * count) - (0, count / 2, count)[place]]
    )
    return y[:, None], x[None, :], np.maximum(down[:, None], across[None, :])


@functools.cache
def waves(placement):
    """Return {(n, m): the cosine on the whole grid [h, w]} and the distances [h, w]."""
    y, x, distance = position(placement)
    modes = {(n, m): np.cos(np.pi * n * y) * np.cos(np.pi * m * x) for n in range(ROWS) for m in range(COLUMNS)}
    return modes, distance


def by_series(linear, quadratic, visible, placement):
    """Fit the cosines to visible [rows, columns, C] and evaluate them at every cell, each at its own time."""
    modes, distance = waves(placement)
    inside = quarters.visible_slices(2 * ROWS, 2 * COLUMNS, placement)
    known = np.stack([mode[inside].reshape(-1) for mode in modes.values()], 1)
    weights = np.linalg.solve(known, np.asarray(visible, np.float64).reshape(-1, WIDTH))
    grid = np.zeros((*distance.shape, WIDTH))
    for ((n, m), mode), weight in zip(modes.items(), weights):
        time = (linear * distance[..., None] + quadratic * distance[..., None] ** 2) * np.ones(WIDTH)
        grid += weight * mode[..., None] * np.exp(-((np.pi * n) ** 2 + (np.pi * m) ** 2) * time)
    return grid


def test_it_is_the_series_of_cosines_outside_the_block():
    linear, quadratic = np.array([0.01, 0.1, 0.02]), np.array([0.05, 0.01, 0.3])
    visible = random_visible()
    grid = filled(params_of(linear, quadratic), visible)
    assert grid.shape == (9, 2 * ROWS, 2 * COLUMNS, WIDTH) and grid.dtype == np.float32
    for q in range(9):
        np.testing.assert_allclose(grid[q], by_series(linear, quadratic, visible[q], q), atol=2e-5)


@pytest.mark.parametrize("n,m", [(0, 1), (1, 0), (1, 3)])
def test_one_wave_fades_by_its_own_rate(n, m):
    params = params_of(0.02, 0.03)
    for q in range(9):
        modes, d = waves(q)
        wave = modes[n, m]
        block = wave[quarters.visible_slices(*wave.shape, q)]
        visible = jnp.broadcast_to(jnp.asarray(block, jnp.float32)[None, ..., None], (9, ROWS, COLUMNS, WIDTH))
        expected = wave * np.exp(-(np.pi**2) * (n * n + m * m) * (0.02 * d + 0.03 * d * d))
        np.testing.assert_allclose(filled(params, visible)[q], expected[..., None] * np.ones(WIDTH), atol=2e-6)


def test_without_time_the_block_is_mirrored():
    visible = np.asarray(random_visible())
    grid = filled({name: jnp.full(WIDTH, -jnp.inf) for name in ("linear", "quadratic")}, visible)
    for q in range(9):
        (top, left), pads = quarters.split(q), []
        for count, place in ((ROWS, top), (COLUMNS, left)):
            before = (0, count // 2, count)[place]
            pads.append((before, count - before))
        np.testing.assert_allclose(grid[q], np.pad(visible[q], [*pads, (0, 0)], "symmetric"), atol=2e-6)


def test_after_a_long_time_the_mean_is_left():
    visible = np.asarray(random_visible())
    grid = filled({name: jnp.full(WIDTH, 1e6) for name in ("linear", "quadratic")}, visible)
    for q in range(9):
        np.testing.assert_allclose(grid[q][hidden(q)], visible[q].mean((0, 1)) * np.ones((24, 1)), atol=1e-6)


def test_visible_cells_come_back_bit_for_bit_and_all_is_float32():
    visible, params = random_visible().astype(jnp.bfloat16), cosine.init(WIDTH)
    grid = filled(params, visible)
    assert grid.dtype == np.float32
    for q in range(9):
        np.testing.assert_array_equal(grid[q][~hidden(q)], visible[q].astype(jnp.float32).reshape(-1, WIDTH))
    np.testing.assert_array_equal(grid, filled(params, visible.astype(jnp.float32)))


def test_it_is_linear_in_the_features():
    params, a, b = cosine.init(WIDTH), random_visible(1), random_visible(2)
    together = filled(params, 2 * a - 3 * b)
    np.testing.assert_allclose(together, 2 * filled(params, a) - 3 * filled(params, b), atol=1e-5)


@pytest.mark.parametrize("axis", [1, 2])
def test_mirrored_images_give_mirrored_grids(axis):
    visible, (rows, columns) = random_visible(), quarters.split(NINE)
    mirrored = 3 * (2 - rows) + columns if axis == 1 else 3 * rows + 2 - columns
    mirror = extrapolate(cosine.init(WIDTH), jnp.flip(visible, axis), mirrored)
    np.testing.assert_allclose(jnp.flip(mirror, axis), filled(cosine.init(WIDTH), visible), atol=1e-6)


@pytest.mark.parametrize("placements", [(0, 8), (4,), (1, 5)])
def test_few_placements_are_as_among_all(placements):
    visible, drawn = random_visible(), np.resize(np.array(placements, np.int32), 9)
    few = extrapolate(cosine.init(WIDTH), visible, drawn, placements)
    np.testing.assert_allclose(few, extrapolate(cosine.init(WIDTH), visible, drawn), atol=1e-6)


def test_a_block_of_one_cell_is_copied():
    visible = random_visible(batch=2, rows=1, columns=1)
    grid = cosine.extrapolate(cosine.init(WIDTH), visible, np.array([0, 8]), (0, 8))
    np.testing.assert_allclose(grid, jnp.broadcast_to(visible, (2, 2, 2, WIDTH)), atol=1e-6)
    with pytest.raises(UserError, match="width has 2 cells"):
        cosine.extrapolate(cosine.init(WIDTH), random_visible(rows=2, columns=1), NINE)


def test_times_grow_with_the_distance_from_nothing():
    params = cosine.init(5)
    times = np.asarray(cosine.diffusion_time(params, np.array([0.0, 0.5, 1.0])))
    assert times.shape == (3, 5) and not times[0].any() and (np.diff(times, axis=0) > 0).all()
    np.testing.assert_allclose(times[2], np.geomspace(1e-3, 1.0, 5), rtol=1e-3)
    np.testing.assert_allclose(times[1], times[2] * (0.25 + 0.125), rtol=1e-5)


def test_gradients_are_those_of_finite_differences():
    params, visible, weight = params_of(0.05, 0.1), random_visible(), random_visible(3, 9, 2 * ROWS, 2 * COLUMNS)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def evaluate(params, visible):
        return (cosine.extrapolate(params, visible, NINE) * weight).mean()

    _, (of_params, of_visible) = evaluate(params, visible)
    for name, gradient in of_params.items():
        assert np.abs(gradient).min() > 1e-5
        step = 1e-2 * jnp.sign(gradient)
        ahead, back = (float(evaluate(params | {name: params[name] + s * step}, visible)[0]) for s in (1, -1))
        assert ahead - back == pytest.approx(2 * float((gradient * step).sum()), rel=2e-2)
    step = 1e-2 * jnp.sign(of_visible)
    ahead, back = (float(evaluate(params, visible + s * step)[0]) for s in (1, -1))
    assert ahead - back == pytest.approx(2 * float((of_visible * step).sum()), rel=1e-2)


# --- As a propagator --------------------------------------------------------------------------------------------------


def test_it_is_a_propagator_without_a_and_b():
    choice = heat.Heat("cosine")
    params, visible = heat.init(jax.random.key(0), WIDTH, choice), random_visible()
    np.testing.assert_array_equal(heat.extrapolate(params, choice, visible, NINE), filled(params, visible))
    assert choice.names == () and heat.describe(params, choice) == {} and not choice.shortens
    with pytest.raises(ValueError):
        heat.propagator(params, choice, "x", 1.0, COLUMNS)
    with pytest.raises(ValueError):
        heat.shortened(params, choice, 0.5)


@pytest.mark.parametrize("name,value", [("directions", "tied"), ("norm", "layer"), ("init_scale", 0.1)])
def test_choices_of_a_and_b_are_refused(name, value):
    with pytest.raises(ValueError, match=f"heat.{name}"):
        heat.Heat("cosine", **{name: value})
    fields = {"total_steps": 1, "heat.propagator": "cosine"}
    with pytest.raises(UserError, match=f"heat.{name}={value!r}"):
        config_tables.resolve({**fields, f"heat.{name}": value})
    assert config_tables.resolve(fields).heat.propagator == "cosine"
