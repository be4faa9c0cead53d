"""The heat decoder: its shapes and types, and that it is the operator, a position code and blocks, or linear."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qbheat_jax import pytree
from qbheat_jax.errors import UserError
from qbheat_jax.models.decoder import HeatDecoder
from qbheat_jax.ops import heat as heat_lib
from qbheat_jax.ops import quarters

ALL = np.arange(9, dtype=np.int32)


def visible_features(seed=0, batch=9, rows=2, columns=4, width=6):
    return jax.random.normal(jax.random.key(seed), (batch, rows, columns, width))


def decoder_of(depth, **fields):
    return HeatDecoder(outputs=12, width=16, heads=2, depth=depth, **fields)


def shapes(decoder, visible, quarter=ALL):
    """-> (pixels, out), variables, as shapes and types."""
    return jax.eval_shape(decoder.init_with_output, jax.random.key(0), visible, quarter)


@functools.cache
def make(depth, heat=heat_lib.Heat()):
    """-> (variables, compiled features -> (pixels, out)): random parameters, so that no zero hides anything."""
    decoder, rng = decoder_of(depth, heat=heat), np.random.default_rng(0)
    _, variables = shapes(decoder, visible_features())
    variables = jax.tree.map(lambda leaf: rng.normal(0, 0.4, leaf.shape).astype(np.float32), variables)
    apply = jax.jit(decoder.apply)
    return variables, lambda visible: apply(variables, visible, ALL)


def pixels_of(depth):
    """Compiled features -> pixels."""
    _, apply = make(depth)
    return lambda visible: np.asarray(apply(visible)[0])


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shapes_and_types(depth, dtype):
    """Pixels, grid and parameters are float32 whatever is computed in."""
    decoder = decoder_of(depth, dtype=jnp.dtype(dtype))
    (pixels, out), variables = shapes(decoder, visible_features().astype(dtype))
    assert pixels.shape == (9, 4, 8, 2 * 2 * 3) and pixels.dtype == jnp.float32
    assert out["grid"].shape == (9, 4, 8, 6) and out["grid"].dtype == jnp.float32
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    blocks = {name.split("/")[1] for name, _ in pytree.names(variables) if "block" in name}
    assert blocks == {f"block{n}" for n in range(depth)}


@pytest.mark.parametrize("propagator,directions", [("offset", "untied"), ("spectral", "tied")])
def test_the_operator_has_its_parameters(propagator, directions):
    heat = heat_lib.Heat(propagator, directions)
    _, variables = shapes(decoder_of(0, heat=heat), visible_features())
    expected = jax.eval_shape(lambda key: heat_lib.init(key, 6, heat), jax.random.key(0))
    assert pytree.differences(expected, variables["params"]["heat"]) == []


def test_grid_is_the_operators():
    heat = heat_lib.Heat("power", "tied")
    variables, apply = make(0, heat)
    expected = heat_lib.extrapolate(variables["params"]["heat"], heat, visible_features(), ALL)
    np.testing.assert_allclose(apply(visible_features())[1]["grid"], expected, rtol=1e-4, atol=1e-4)


def test_only_the_placements_asked_for_are_needed():
    """Three visible cells a side: corners alone can split it."""
    decoder = decoder_of(0, placements=quarters.PLACEMENT_SETS["corners"])
    visible = visible_features(batch=2, rows=3, columns=3)
    (pixels, _), _ = shapes(decoder, visible, np.array([0, 8]))
    assert pixels.shape == (2, 6, 6, 12)
    with pytest.raises(UserError, match="middle placement"):
        shapes(decoder_of(0), visible, np.array([0, 8]))


def test_depth_0_is_linear_in_the_features():
    """Superposition, once the answer to no features at all is taken out."""
    apply = pixels_of(0)
    a, b = visible_features(1), visible_features(2)
    nothing = apply(jnp.zeros_like(a))
    np.testing.assert_allclose(
        apply(2 * a - 3 * b) - nothing, 2 * (apply(a) - nothing) - 3 * (apply(b) - nothing), atol=1e-3
    )
    assert np.abs(apply(a) - nothing).max() > 0.1


def test_depth_0_reads_each_cell_alone():
    """A change of one visible cell reaches that cell and the three that are made from it, no other."""
    apply = pixels_of(0)
    visible = visible_features()
    change = np.abs(apply(visible.at[:, 1, 2].add(1.0)) - apply(visible)).max(-1)
    for q in ALL:
        rows, columns = (quarters.sources(n, p)[0] for n, p in zip((4, 8), quarters.split(int(q))))
        np.testing.assert_array_equal(change[q] > 1e-5, np.outer(rows == 1, columns == 2))


def test_blocks_mix_cells_and_are_not_linear():
    apply = pixels_of(1)
    visible = visible_features()
    change = np.abs(apply(visible.at[:, 1, 2].add(1.0)) - apply(visible)).max(-1)
    assert change.min() > 1e-6
    assert np.abs(apply(2 * visible) - 2 * apply(visible) + apply(0 * visible)).max() > 0.1


def test_blocks_know_where_a_cell_is():
    """The same feature in every cell, and yet no two cells with the same pixels."""
    cells = pixels_of(1)(jnp.ones((9, 2, 4, 6)))[0].reshape(32, -1)
    distance = np.abs(cells[:, None] - cells[None]).max(-1) + np.eye(32)
    assert distance.min() > 1e-3


def test_width_must_hold_the_position_code():
    with pytest.raises(ValueError, match="multiple of 4 channels, not 18"):
        shapes(HeatDecoder(outputs=12, width=18, heads=2, depth=1), visible_features())
