"""The heat operator against closed forms, and the extrapolation against a loop over every cell."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from qbheat_jax.errors import UserError
from qbheat_jax.ops import heat as heat_lib
from qbheat_jax.ops import quarters
from qbheat_jax.ops.heat import DIRECTIONS, MATRICES, NORMS, Heat

WIDTH = 6
NINE = np.arange(9, dtype=np.int32)
STEPS = (-1.0, -0.5, 0.5, 1.0)

every_propagator = pytest.mark.parametrize("propagator", MATRICES)
both_directions = pytest.mark.parametrize("directions", DIRECTIONS)


def random_params(heat, width=WIDTH, seed=0, scale=0.4):
    """Matrices with eigenvalues up to about `scale`, and for `spectral` a basis that is not orthogonal."""
    params = heat_lib.init(jax.random.key(seed), width, Heat(heat.propagator, heat.directions, init_scale=scale))
    if "basis" in params:
        params["basis"] += 0.1 * jax.random.normal(jax.random.key(seed + 1), (width, width))
    return params


def random_visible(batch=9, rows=2, columns=4, width=WIDTH, seed=2):
    return jax.random.normal(jax.random.key(seed), (batch, rows, columns, width))


def commuting(width=WIDTH, seed=0):
    """A, and a polynomial of it."""
    a = np.random.default_rng(seed).normal(size=(width, width)) * 0.8 / np.sqrt(width)
    return a, 0.7 * a + 0.6 * a @ a - 0.3 * np.eye(width)


def as_params(a, b, directions="untied"):
    """Params in which a step back along x, y has the generators -A, -B."""
    params = {"x+": a, "y+": b} if directions == "tied" else {"x+": a, "x-": -a, "y+": b, "y-": -b}
    return {name: jnp.asarray(matrix, jnp.float32) for name, matrix in params.items()}


def propagator(params, heat, axis, distance, cells=4):
    return np.asarray(heat_lib.propagator(params, heat, axis, distance, cells), np.float64)


def layer_norm(z):
    return (z - z.mean()) / np.sqrt(z.var() + 1e-6)


def by_loops(params, heat, visible, quarter, first="x"):
    """Every cell on its own: the visible cell it comes from, carried along one axis and then along the other."""
    visible = np.asarray(visible, np.float64)
    batch, rows, columns, width = visible.shape
    maps = functools.cache(lambda axis, d: propagator(params, heat, axis, d, columns if axis == "x" else rows))
    norm = layer_norm if heat.norm == "layer" else lambda z: z
    grid = np.zeros((batch, 2 * rows, 2 * columns, width))
    for b, q in enumerate(np.asarray(quarter)):
        row, column = quarters.split(int(q))
        (source_y, step_y), (source_x, step_x) = quarters.sources(2 * rows, row), quarters.sources(2 * columns, column)
        for i, j in np.ndindex(2 * rows, 2 * columns):
            z = visible[b, source_y[i], source_x[j]]
            for axis, d in (("x", step_x[j]), ("y", step_y[i]))[:: 1 if first == "x" else -1]:
                if d:
                    z = z + (maps(axis, float(d)) - np.eye(width)) @ norm(z)
            grid[b, i, j] = z
    return grid


# --- Propagators ----------------------------------------------------------------------------------------------------


@both_directions
def test_offset_is_one_finite_difference(directions):
    heat = Heat("offset", directions)
    params = random_params(heat)
    for axis in "xy":
        for d in (0.5, 1.0):
            ahead = np.eye(WIDTH) + d * np.asarray(params[f"{axis}+"])
            back = np.linalg.inv(ahead) if directions == "tied" else np.eye(WIDTH) + d * np.asarray(params[f"{axis}-"])
            np.testing.assert_allclose(propagator(params, heat, axis, d), ahead, atol=1e-6)
            np.testing.assert_allclose(propagator(params, heat, axis, -d), back, atol=1e-5)


@pytest.mark.parametrize("propagator_name", ["exp", "spectral"])
@pytest.mark.parametrize("d,e", [(0.25, 0.25), (0.5, 0.5), (0.25, 0.75), (-0.5, -0.5)])
@both_directions
def test_exponential_at_d_then_e_is_that_at_their_sum(propagator_name, d, e, directions):
    heat = Heat(propagator_name, directions)
    params = random_params(heat)
    one, other, both = (propagator(params, heat, "y", distance) for distance in (d, e, d + e))
    np.testing.assert_allclose(other @ one, both, atol=1e-5)
    assert np.abs(one - both).max() > 0.02


def test_offset_at_a_half_twice_is_not_offset_at_one():
    heat = Heat("offset")
    params = random_params(heat)
    half = propagator(params, heat, "x", 0.5)
    assert np.abs(half @ half - propagator(params, heat, "x", 1.0)).max() > 0.02


@pytest.mark.parametrize("distance", STEPS)
@both_directions
def test_exp_is_the_matrix_exponential(distance, directions):
    heat = Heat("exp", directions)
    params = random_params(heat)
    back = "x+" if directions == "tied" else "x-"
    signed = distance if directions == "tied" or distance > 0 else -distance
    expected = scipy.linalg.expm(signed * np.asarray(params["x+" if distance > 0 else back], np.float64))
    np.testing.assert_allclose(propagator(params, heat, "x", distance), expected, atol=1e-5)


@pytest.mark.parametrize("norm", [0.0, 1e-4, 0.7, 0.8, 3.0, 40.0])
def test_exponential_and_its_gradient_are_scipys(norm):
    draw = np.random.default_rng(0)
    a, toward = draw.normal(size=(2, 20, 20))
    a *= norm / np.linalg.norm(a, 1)
    e, pull = jax.vjp(heat_lib.exponential, jnp.asarray(a, jnp.float32))
    expected = scipy.linalg.expm(a)
    np.testing.assert_allclose(e, expected - np.eye(20), atol=1e-6 * np.abs(expected).max())
    # The adjoint of the derivative in the direction of E is the derivative at the transpose.
    (gradient,) = pull(jnp.asarray(toward, jnp.float32))
    expected = scipy.linalg.expm_frechet(a.T, toward, compute_expm=False)
    np.testing.assert_allclose(gradient, expected, atol=2e-6 * np.abs(expected).max())


def test_exponential_of_what_is_too_large_is_no_number():
    assert np.isnan(heat_lib.exponential(1e5 * jnp.eye(3))).all()
    a = np.diag([-4e4, 0.0, 1.0])
    np.testing.assert_allclose(
        heat_lib.exponential(jnp.asarray(a, jnp.float32)), scipy.linalg.expm(a) - np.eye(3), rtol=1e-2
    )


@pytest.mark.parametrize("distance", [0.5, 1.0])
def test_power_tends_to_exp_with_the_number_of_cells(distance):
    params = random_params(Heat("exp"))
    limit = propagator(params, Heat("exp"), "x", distance)
    errors = [np.linalg.norm(propagator(params, Heat("power"), "x", distance, n) - limit) for n in (8, 16, 32, 64, 128)]
    ratios = np.array(errors[:-1]) / errors[1:]
    assert ((ratios > 1.7) & (ratios < 2.3)).all(), ratios  # error proportional to 1 / n


@pytest.mark.parametrize("distance", STEPS)
@pytest.mark.parametrize("cells", [2, 6, 14])
def test_power_is_one_finite_difference_a_cell(distance, cells):
    params = random_params(Heat("power"))
    a = np.asarray(params["x+" if distance > 0 else "x-"], np.float64)
    z = moved = np.random.default_rng(0).normal(size=WIDTH)
    for _ in range(round(cells * abs(distance))):
        moved = moved + a @ moved / cells
    np.testing.assert_allclose(propagator(params, Heat("power"), "x", distance, cells) @ z, moved, atol=1e-5)


def test_power_refuses_part_of_a_cell():
    with pytest.raises(ValueError, match="heat.propagator='power'"):
        propagator(random_params(Heat("power")), Heat("power"), "x", 0.5, 3)


@every_propagator
@pytest.mark.parametrize("distance", [0.5, 1.0])
@pytest.mark.parametrize("axis", ["x", "y"])
def test_tied_a_step_back_inverts_the_step_ahead(propagator, distance, axis):
    heat = Heat(propagator, "tied")
    params = random_params(heat)
    ahead, back = (np.asarray(heat_lib.propagator(params, heat, axis, d, 4)) for d in (distance, -distance))
    np.testing.assert_allclose(back @ ahead, np.eye(WIDTH), atol=2e-5)
    assert np.abs(ahead - back).max() > 0.05


@every_propagator
@both_directions
def test_init_is_the_identity_and_copies_the_block(propagator, directions):
    heat = Heat(propagator, directions)
    params = heat_lib.init(jax.random.key(0), WIDTH, heat)
    for axis in "xy":
        for d in STEPS:
            np.testing.assert_allclose(heat_lib.propagator(params, heat, axis, d, 4), np.eye(WIDTH), atol=1e-6)
    visible = np.asarray(random_visible())
    grid = np.asarray(heat_lib.extrapolate(params, heat, visible, NINE))
    for q in NINE:
        rows, columns = (quarters.sources(n, p)[0] for n, p in zip((4, 8), quarters.split(int(q))))
        np.testing.assert_allclose(grid[q], visible[q][rows][:, columns], atol=0 if propagator == "offset" else 1e-5)


@both_directions
@every_propagator
def test_init_scale_is_the_deviation_times_the_root_of_the_width(propagator, directions):
    heat = Heat(propagator, directions, init_scale=0.5)
    params = heat_lib.init(jax.random.key(0), 256, heat)
    assert set(params) == set(heat.names) | ({"basis"} if propagator == "spectral" else set())
    for name in heat.names:
        assert params[name].dtype == jnp.float32
        assert params[name].shape == ((256,) if propagator == "spectral" else (256, 256))
        assert float(params[name].std()) * 16 == pytest.approx(0.5, rel=0.2)
    assert len({float(params[name].reshape(-1)[0]) for name in heat.names}) == len(heat.names)  # drawn independently


def test_choices_are_checked():
    for field in ("propagator", "directions", "norm"):
        with pytest.raises(ValueError, match=f"heat.{field}='wave' is not one of"):
            Heat(**{field: "wave"})


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("axis, quarter", [("x", 0), ("y", 8)])
def test_carrying_is_what_extrapolation_does(norm, axis, quarter):
    heat = Heat("offset", norm=norm)
    params, visible = random_params(heat), random_visible(1)
    distance = 1.0 if quarter == 0 else -1.0
    grid = heat_lib.extrapolate(params, heat, visible, np.array([quarter]))
    # Right of the top left quarter; above the bottom right one.
    beside = grid[:, :2, 4:]
    np.testing.assert_allclose(heat_lib.carry(params, heat, visible, axis, distance, 4), beside, atol=1e-5)


@pytest.mark.parametrize("propagator", ["offset", "exp", "spectral"])
@both_directions
def test_a_shortened_operator_goes_part_of_the_way(propagator, directions):
    heat = Heat(propagator, directions)
    params = random_params(heat)
    short = heat_lib.shortened(params, heat, 0.25)
    for d in (-1.0, 0.5):
        expected = heat_lib.propagator(params, heat, "x", d / 4, 4)
        np.testing.assert_allclose(heat_lib.propagator(short, heat, "x", d, 4), expected, atol=1e-5)
    with pytest.raises(ValueError, match="heat.propagator='power'"):
        heat_lib.shortened(params, Heat("power"), 0.5)


# --- spectral -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [3, 6])
@both_directions
def test_spectral_generators_commute(width, directions):
    heat = Heat("spectral", directions)
    params = random_params(heat, width)
    a, b = (heat_lib.generator(params, heat, name) for name in ("x+", "y+"))
    assert float(heat_lib.commutator(a, b)) < 1e-5
    p, q = (propagator(params, heat, axis, d) for axis, d in (("x", 1.0), ("y", -0.5)))
    np.testing.assert_allclose(p @ q, q @ p, atol=1e-5)


@pytest.mark.parametrize("width", [3, 6])
@both_directions
@pytest.mark.parametrize("distance", STEPS)
def test_spectral_is_the_exponential_of_its_generator(width, directions, distance):
    heat = Heat("spectral", directions)
    params = random_params(heat, width)
    name = "x-" if distance < 0 and directions == "untied" else "x+"
    signed = distance if directions == "tied" else abs(distance)
    expected = scipy.linalg.expm(signed * np.asarray(heat_lib.generator(params, heat, name), np.float64))
    np.testing.assert_allclose(propagator(params, heat, "x", distance), expected, atol=2e-5)


@pytest.mark.parametrize("width", [3, 6, 9])
def test_spectral_eigenvalues_are_those_of_the_generator(width):
    heat = Heat("spectral")
    params = random_params(heat, width)
    said = np.asarray(heat_lib.eigenvalues(params["y-"]))
    found = list(np.linalg.eigvals(np.asarray(heat_lib.generator(params, heat, "y-"), np.float64)))
    assert said.shape == (width,) and (np.abs(said.imag) > 1e-6).sum() == 2 * (width // 4)
    for value in said:  # each said once
        nearest = min(found, key=lambda f: abs(f - value))
        assert abs(nearest - value) < 1e-4
        found.remove(nearest)


def test_spectral_complex_pairs_are_real_rotations():
    """width 4: two real eigenvalues, then a pair growth +- i frequency: a turn by `frequency`, grown by exp(growth)."""
    values = jnp.array([0.3, -0.2, 0.1, 0.7])
    params = {"basis": jnp.eye(4), "x+": values, "y+": values}
    turn = np.exp(0.1) * np.array([[np.cos(0.7), -np.sin(0.7)], [np.sin(0.7), np.cos(0.7)]])
    expected = scipy.linalg.block_diag(np.exp(0.3), np.exp(-0.2), turn)
    found = heat_lib.propagator(params, Heat("spectral", "tied"), "x", 1.0, 4)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(heat_lib.eigenvalues(values), [0.3, -0.2, 0.1 + 0.7j, 0.1 - 0.7j], atol=1e-6)


# --- Extrapolation --------------------------------------------------------------------------------------------------


@every_propagator
@both_directions
@pytest.mark.parametrize("norm", NORMS)
def test_extrapolate_is_the_loop_over_cells(propagator, directions, norm):
    """All nine placements in one batch, on a grid of 4 x 8 cells."""
    heat = Heat(propagator, directions, norm)
    params, visible = random_params(heat), random_visible()
    grid = heat_lib.extrapolate(params, heat, visible, NINE)
    assert grid.shape == (9, 4, 8, WIDTH) and grid.dtype == jnp.float32
    np.testing.assert_allclose(grid, by_loops(params, heat, visible, NINE), atol=3e-5)


@pytest.mark.parametrize("propagator,directions,alone", [("offset", "untied", (1, 4, 8)), ("power", "tied", (0, 5))])
def test_placements_in_one_batch_are_as_one_at_a_time(propagator, directions, alone):
    heat = Heat(propagator, directions)
    params, visible = random_params(heat), random_visible()
    shuffled = np.array([8, 1, 4, 0, 5, 1, 8, 3, 2])
    together = np.asarray(heat_lib.extrapolate(params, heat, visible, shuffled))
    for q in alone:
        grid = heat_lib.extrapolate(params, heat, visible, np.full(9, q), (q,))
        np.testing.assert_allclose(together[shuffled == q], grid[shuffled == q], atol=1e-6)


@every_propagator
def test_visible_cells_come_back_bit_for_bit(propagator):
    heat = Heat(propagator, norm="layer")
    visible = random_visible().astype(jnp.bfloat16)
    grid = heat_lib.extrapolate(random_params(heat), heat, visible, NINE)
    assert grid.dtype == jnp.float32
    for q in NINE:
        rows, columns = quarters.visible_slices(4, 8, int(q))
        np.testing.assert_array_equal(grid[q, rows, columns], visible[q].astype(jnp.float32))


@every_propagator
def test_bfloat16_features_are_changed_by_products_of_bfloat16(propagator):
    heat, visible = Heat(propagator), random_visible().astype(jnp.bfloat16)
    params = random_params(heat)
    grid = heat_lib.extrapolate(params, heat, visible, NINE)
    exact = heat_lib.extrapolate(params, heat, visible.astype(jnp.float32), NINE)
    error = np.abs(grid - exact).max()
    assert 1e-5 < error < 2**-7 * np.abs(exact).max()


def test_layer_norm_changes_by_the_normalised_feature():
    """One masked cell of each kind by hand: z + (P - I) zhat, along x, then along y of what x gave."""
    heat = Heat("exp", norm="layer")
    params, visible = random_params(heat), np.asarray(random_visible()) * 3 + 1
    grid = np.asarray(heat_lib.extrapolate(params, heat, visible, NINE))[0]
    px, py = (propagator(params, heat, axis, 1.0) - np.eye(WIDTH) for axis in "xy")
    z = visible[0, 1, 3].astype(np.float64)
    across = z + px @ layer_norm(z)
    np.testing.assert_allclose(grid[1, 7], across, atol=1e-4)
    np.testing.assert_allclose(grid[3, 3], z + py @ layer_norm(z), atol=1e-4)
    np.testing.assert_allclose(grid[3, 7], across + py @ layer_norm(across), atol=1e-4)


@every_propagator
@pytest.mark.parametrize("axis", ["x", "y"])
def test_mirrored_images_swap_the_directions(propagator, axis):
    heat = Heat(propagator)
    params, visible = random_params(heat), random_visible()
    swapped = params | {f"{axis}+": params[f"{axis}-"], f"{axis}-": params[f"{axis}+"]}
    rows, columns = quarters.split(NINE)
    mirrored, flipped = (3 * rows + 2 - columns, 2) if axis == "x" else (3 * (2 - rows) + columns, 1)
    grid = heat_lib.extrapolate(params, heat, visible, NINE)
    mirror = heat_lib.extrapolate(swapped, heat, jnp.flip(visible, flipped), mirrored)
    np.testing.assert_allclose(jnp.flip(mirror, flipped), grid, atol=2e-5)
    unswapped = heat_lib.extrapolate(params, heat, jnp.flip(visible, flipped), mirrored)
    assert np.abs(jnp.flip(unswapped, flipped) - grid).max() > 0.1


@pytest.mark.parametrize("propagator", ["offset", "power", "exp"])
def test_both_orders_agree_where_a_and_b_commute_and_only_there(propagator):
    heat, visible = Heat(propagator, "tied"), random_visible()
    params = as_params(*commuting(), "tied")
    grid = heat_lib.extrapolate(params, heat, visible, NINE)
    np.testing.assert_allclose(grid, by_loops(params, heat, visible, NINE, first="y"), atol=1e-4)

    params = random_params(heat)
    grid = np.asarray(heat_lib.extrapolate(params, heat, visible, NINE))
    change = np.abs(grid - by_loops(params, heat, visible, NINE, first="y")).max(-1)
    for q in NINE:
        moved = [quarters.sources(n, p)[1] != 0 for n, p in zip((4, 8), quarters.split(int(q)))]
        diagonal = np.outer(*moved)
        assert change[q][diagonal].min() > 1e-3 and change[q][~diagonal].max() < 1e-4


@pytest.mark.parametrize(
    "propagator,directions", [("exp", "untied"), ("exp", "tied"), ("spectral", "tied"), ("power", "tied")]
)
def test_a_field_that_solves_the_equations_is_reproduced_from_any_quarter(propagator, directions):
    """z(x, y) = expm(x A) expm(y B) z0 (for `power`, its finite difference) solves z_x = A z, z_y = B z exactly."""
    height, width = 4, 8
    heat = Heat(propagator, directions)
    if propagator == "spectral":
        params = random_params(heat)
        a, b = (np.asarray(heat_lib.generator(params, heat, name), np.float64) for name in heat.names)
    else:
        a, b = commuting()
        params = as_params(a, b, directions)
    if propagator == "power":
        across, down = np.eye(WIDTH) + a / (width / 2), np.eye(WIDTH) + b / (height / 2)
    else:
        across, down = scipy.linalg.expm(a / (width / 2)), scipy.linalg.expm(b / (height / 2))
    power = np.linalg.matrix_power
    z0 = np.random.default_rng(1).normal(size=WIDTH)
    field = np.array([[power(across, j) @ power(down, i) @ z0 for j in range(width)] for i in range(height)])
    visible = np.stack([field[quarters.visible_slices(height, width, int(q))] for q in NINE])
    grid = heat_lib.extrapolate(params, heat, visible, NINE)
    for q in NINE:
        np.testing.assert_allclose(grid[q], field, atol=2e-4 * np.abs(field).max(), err_msg=quarters.NAMES[q])


@every_propagator
@pytest.mark.parametrize("directions,init_scale,norm", [("untied", 0.0, "none"), ("tied", 0.4, "layer")])
def test_gradients_are_finite_and_those_of_finite_differences(propagator, directions, init_scale, norm):
    """The centre alone: it needs all four directions."""
    heat = Heat(propagator, directions, norm)
    params, visible, quarter = random_params(heat, scale=init_scale), random_visible(2), np.array([4, 4])
    weight = random_visible(2, 4, 8, seed=5)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def evaluate(params, visible):
        return (heat_lib.extrapolate(params, heat, visible, quarter, (4,)) * weight).mean()

    _, (gradient, over_visible) = evaluate(params, visible)
    assert all(np.isfinite(g).all() for g in (*gradient.values(), over_visible))
    assert all(np.abs(gradient[name]).max() > 1e-3 for name in heat.names)
    for n, name in enumerate(params):
        step = jax.random.normal(jax.random.key(n), params[name].shape) + 3 * jnp.sign(gradient[name])
        step = 5e-3 * step / jnp.linalg.norm(step)
        ahead, back = (evaluate(params | {name: params[name] + sign * step}, visible)[0] for sign in (1, -1))
        slope = float(ahead) - float(back)
        assert slope == pytest.approx(2 * float((gradient[name] * step).sum()), rel=2e-2, abs=2e-6), name
    step = 5e-3 * jnp.sign(over_visible)
    slope = float(evaluate(params, visible + step)[0]) - float(evaluate(params, visible - step)[0])
    assert slope == pytest.approx(2 * float((over_visible * step).sum()), rel=2e-2)


def test_grids_that_cannot_be_split_are_refused():
    heat = Heat()
    params, visible = random_params(heat), random_visible(1, 3, 2)
    with pytest.raises(UserError, match="height has 6 cells"):
        heat_lib.extrapolate(params, heat, visible, np.array([0]))
    assert heat_lib.extrapolate(params, heat, visible, np.array([8]), (0, 8)).shape == (1, 6, 4, WIDTH)


# --- What A and B are -----------------------------------------------------------------------------------------------


def test_commutator():
    a, b = commuting()
    assert float(heat_lib.commutator(jnp.asarray(a), jnp.asarray(b))) < 1e-6
    zero = jnp.zeros((WIDTH, WIDTH))
    assert float(heat_lib.commutator(zero, zero)) == 0 == float(heat_lib.commutator(jnp.asarray(a), zero))
    x, y = jnp.array([[0.0, 2.0], [0.0, 0.0]]), jnp.array([[0.0, 0.0], [3.0, 0.0]])
    assert float(heat_lib.commutator(x, y)) == pytest.approx(2**0.5)  # diag(6, -6), over 2 * 3


def test_correlation_closes_the_heat_equation():
    """z_xx + S z_yy = 0 with z_xx = A A z, z_yy = B B z, wherever z is; and the paper's form of S."""
    a, b = commuting()
    s = heat_lib.correlation(a, b)
    expm = scipy.linalg.expm
    field = np.array([expm(x * a) @ expm(y * b) @ np.ones(WIDTH) for x, y in np.ndindex(3, 3)])
    assert np.abs(field @ (a @ a).T + field @ (s @ b @ b).T).max() < 1e-8 * np.linalg.norm(s)
    assert np.abs(field @ (a @ a).T).max() > 0.1
    a, b = np.random.default_rng(3).normal(size=(2, WIDTH, WIDTH))
    s = heat_lib.correlation(a, b)
    assert s.dtype == np.float64
    np.testing.assert_allclose(s, -a @ a @ np.linalg.inv(b @ b), rtol=1e-6, atol=1e-9)
    with pytest.raises(np.linalg.LinAlgError):
        heat_lib.correlation(a, np.zeros((WIDTH, WIDTH)))


@every_propagator
@both_directions
def test_describe(propagator, directions):
    heat = Heat(propagator, directions)
    params = random_params(heat)
    said = heat_lib.describe(params, heat)
    signs = "+" if directions == "tied" else "+-"
    per_name = {f"{what}/{name}" for what in ("spectrum", "norm") for name in heat.names}
    assert set(said) == per_name | {f"{what}/{sign}" for what in ("commutator", "S") for sign in signs}
    for sign in signs:
        a, b = (np.asarray(heat_lib.generator(params, heat, axis + sign), np.float64) for axis in "xy")
        assert said[f"norm/x{sign}"] == pytest.approx(np.linalg.norm(a))
        assert said[f"spectrum/y{sign}"].sum() == pytest.approx(np.trace(b), abs=1e-5)
        expected = np.linalg.norm(a @ b - b @ a) / np.linalg.norm(a) / np.linalg.norm(b)
        assert said[f"commutator/{sign}"] == pytest.approx(expected, abs=1e-6)
        closed = said[f"S/{sign}"] @ b @ b
        np.testing.assert_allclose(closed, -a @ a, atol=1e-6 * max(1, np.linalg.norm(said[f"S/{sign}"])))


@every_propagator
def test_describe_before_the_first_step(propagator):
    heat = Heat(propagator)
    said = heat_lib.describe(heat_lib.init(jax.random.key(0), WIDTH, heat), heat)
    assert said["commutator/+"] == said["commutator/-"] == said["norm/x+"] == 0
    assert not said["spectrum/y-"].any()
    assert "S/+" not in said and "S/-" not in said
