"""Mobile-Former: its shapes, and what training needs of it. test_port_parity.py has activations, test_port_strict.py sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qbheat_jax.models.layers import attend
from qbheat_jax.models.mobile_former import (
    VARIANTS,
    MobileFormer,
    Variant,
    cells_attend,
    tokens_attend,
)


def initial(module, *args):
    return jax.eval_shape(lambda: module.init(jax.random.key(0), *args))


def test_strides_and_widths():
    for name in ("26m", "52m", "96m", "151m", "214m", "294m", "508m"):  # as released
        encoder = MobileFormer(VARIANTS[name])
        assert (encoder.stride, encoder.width) == (32, VARIANTS[name].blocks[-1][2])
    for name in ("w720", "w1440", "w2880"):  # reconstructed
        encoder = MobileFormer(VARIANTS[name])
        assert (encoder.stride, encoder.width) == (16, int(name[1:]))


def test_tiny_on_images_that_are_not_square():
    encoder = MobileFormer(VARIANTS["tiny"])
    images = jnp.zeros((2, 64, 96, 3))
    (features, out), _ = jax.eval_shape(lambda: encoder.init_with_output(jax.random.key(0), images))
    assert encoder.stride == 8 and features.shape == (2, 8, 12, encoder.width)
    assert out["stem"].shape == (2, 32, 48, 16) and out["tokens"].shape == (2, 3, 64)
    assert {f"features_{n}" for n in range(5)} | {f"tokens_{n}" for n in range(5)} | {"stem", "tokens"} == set(out)


@pytest.mark.parametrize("name, stride", [
    ("tiny", 4), pytest.param("w720", 8, marks=pytest.mark.weekly), pytest.param("52m", 16, marks=pytest.mark.weekly),
])  # fmt: skip
def test_half_the_stride_is_the_same_weights_on_twice_as_many_cells(name, stride):
    encoder, own = MobileFormer(VARIANTS[name], last_stride=1), MobileFormer(VARIANTS[name])
    images = jnp.zeros((1, 64, 96, 3))
    (features, out), variables = jax.eval_shape(lambda: encoder.init_with_output(jax.random.key(0), images))
    assert encoder.stride == stride == own.stride // 2 and features.shape == (1, 64 // stride, 96 // stride, own.width)
    assert out["features_0"].shape[1] == 64 // (4 if VARIANTS[name].blocks[0][3] == 2 else 2)  # the first blocks stride
    assert jax.tree.map(lambda leaf: leaf.shape, variables) == jax.tree.map(
        lambda leaf: leaf.shape, initial(own, images)
    )


SMALL = Variant(8, 2, 16, ((1, 2, 8, 2, 2),), width=12)


def test_training_in_bfloat16_keeps_float32_parameters_and_a_finite_input_gradient():
    encoder = MobileFormer(SMALL, drop_path=0.2, dtype=jnp.bfloat16)
    random = np.random.default_rng(0)
    images = random.normal(size=(2, 8, 12, 3)).astype(np.float32)
    shapes = initial(encoder, images)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
    variables = jax.tree.map(lambda leaf: random.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)

    @jax.jit
    def step(images):
        def loss(images):
            rngs = {"drop_path": jax.random.key(2)}
            (features, _), updated = encoder.apply(variables, images, True, mutable=["batch_stats"], rngs=rngs)
            return jnp.square(features.astype(jnp.float32)).mean(), (features, updated["batch_stats"])

        (_, (features, updated)), gradient = jax.value_and_grad(loss, has_aux=True)(images)
        return features, updated, gradient

    features, updated, gradient = step(images)
    assert features.dtype == jnp.bfloat16 and features.shape == (2, 2, 3, 12)
    assert np.isfinite(np.float32(features)).all() and float(features.max()) > 0
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0
    assert {leaf.dtype for leaf in jax.tree.leaves(updated)} == {jnp.dtype(jnp.float32)}
    moved = jax.tree.map(lambda a, b: (a != b).any(), variables["batch_stats"], updated)
    assert all(jax.tree.leaves(moved))  # every batch norm has seen the batch


@pytest.mark.parametrize("heads", [1, 3])
def test_attention_between_tokens_and_cells_is_plain_attention_with_its_gradients(heads):
    draw = np.random.default_rng(0).normal
    tokens, value, g_tokens = (draw(size=(2, 4, 12)).astype(np.float32) for _ in range(3))
    cells, g_cells = (draw(size=(2, 35, 12)).astype(np.float32) for _ in range(2))

    def outputs(function, cotangent, *inputs):
        y, vjp = jax.vjp(function, *inputs)
        return y, *vjp(cotangent)

    @jax.jit
    def pairs(tokens, value, cells, g_tokens, g_cells):
        return (
            (
                outputs(lambda q, x: tokens_attend(q, x, heads), g_tokens, tokens, cells),
                outputs(lambda q, x: attend(q, x, x, heads), g_tokens, tokens, cells),
            ),
            (
                outputs(lambda x, k, v: cells_attend(x, k, v, heads), g_cells, cells, tokens, value),
                outputs(lambda x, k, v: attend(x, k, v, heads), g_cells, cells, tokens, value),
            ),
        )

    for ours, plain in pairs(tokens, value, cells, g_tokens, g_cells):
        for a, b in zip(ours, plain, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
