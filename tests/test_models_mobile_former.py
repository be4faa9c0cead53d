"""Mobile-Former: its sizes, shapes, and what training needs of it. Its activations are checked in test_port_parity.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qbheat_jax.models.layers import attend
from qbheat_jax.models.mobile_former import (
    VARIANTS,
    MobileFormer,
    MobileFormerHead,
    Variant,
    cells_attend,
    tokens_attend,
)


def count(variables):
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def initial(module, *args):
    return jax.eval_shape(lambda: module.init(jax.random.key(0), *args))


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("26m", 3_232_788),
        ("52m", 3_469_092),
        ("96m", 4_585_252),
        ("151m", 7_595_828),
        ("214m", 9_425_920),
        ("294m", 11_422_648),
        ("508m", 13_976_976),
    ],
)
def test_size_of_the_released_variants_with_their_classifier(name, parameters):
    variant = VARIANTS[name]
    encoder, head = MobileFormer(variant), MobileFormerHead(1000, variant.features, variant.groups)
    assert (encoder.stride, encoder.width) == (32, variant.blocks[-1][2])
    features = jnp.zeros((1, 1, 1, encoder.width))
    out = {"tokens": jnp.zeros((1, variant.tokens, variant.token_dim))}
    assert count(initial(encoder, jnp.zeros((1, 32, 32, 3)))) + count(initial(head, features, out)) == parameters


@pytest.mark.parametrize("name, parameters", [("w720", 5_011_240), ("w1440", 11_753_328), ("w2880", 25_377_312)])
def test_size_of_the_reconstructed_encoders(name, parameters):
    encoder = MobileFormer(VARIANTS[name])
    assert (encoder.stride, encoder.width) == (16, int(name[1:]))
    norm = 2 * encoder.width  # the count of the reconstruction leaves the last batch norm out
    assert count(initial(encoder, jnp.zeros((1, 32, 32, 3)))) - norm == parameters


def test_tiny_on_images_that_are_not_square():
    encoder = MobileFormer(VARIANTS["tiny"])
    images = jnp.zeros((2, 64, 96, 3))
    (features, out), _ = jax.eval_shape(lambda: encoder.init_with_output(jax.random.key(0), images))
    assert encoder.stride == 8 and features.shape == (2, 8, 12, encoder.width)
    assert out["stem"].shape == (2, 32, 48, 16) and out["tokens"].shape == (2, 3, 64)
    assert {f"features_{n}" for n in range(5)} | {f"tokens_{n}" for n in range(5)} | {"stem", "tokens"} == set(out)


@pytest.mark.parametrize("name, stride", [("tiny", 4), ("w720", 8), ("52m", 16)])
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


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_attention_between_tokens_and_cells_is_plain_attention_with_its_gradients(heads):
    draw = np.random.default_rng(0).normal
    tokens, value, g_tokens = (draw(size=(2, 4, 12)).astype(np.float32) for _ in range(3))
    cells, g_cells = (draw(size=(2, 35, 12)).astype(np.float32) for _ in range(2))

    def outputs(function, cotangent, *inputs):
        y, vjp = jax.vjp(function, *inputs)
        return y, *vjp(cotangent)

    pairs = (
        (
            outputs(lambda q, x: tokens_attend(q, x, heads), g_tokens, tokens, cells),
            outputs(lambda q, x: attend(q, x, x, heads), g_tokens, tokens, cells),
        ),
        (
            outputs(lambda x, k, v: cells_attend(x, k, v, heads), g_cells, cells, tokens, value),
            outputs(lambda x, k, v: attend(x, k, v, heads), g_cells, cells, tokens, value),
        ),
    )
    for ours, plain in pairs:
        for a, b in zip(ours, plain, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
