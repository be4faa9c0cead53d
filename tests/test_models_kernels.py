"""Convolutions and pooling, with their own gradients, against XLA's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qbheat_jax.models import kernels


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def xla(x, kernel, stride, padding="symmetric"):
    """A convolution of as many groups as its channels call for, as XLA does it at its highest precision."""
    pad = kernel.shape[0] // 2
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME" if padding == "same" else [(pad, pad)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] // kernel.shape[2],
        precision="highest",
    )


def value_and_gradients(function, gradient, *args):
    y, vjp = jax.vjp(function, *args)
    return y, *vjp(gradient)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("queries, keys", [(5, 7), (9, 9)])
def test_attention_and_its_gradients(queries, keys, biased, dtype, tolerance):
    inputs = [
        normal(0, 2, queries, 3, 4),
        normal(1, 2, keys, 3, 4),
        normal(2, 2, keys, 3, 4),
        normal(3, 2, queries, 3, 4),
    ]
    query, key, value, g = (jnp.asarray(3 * x, dtype) for x in inputs)
    bias = jnp.asarray(normal(4, 2, 3, queries, keys)) if biased else None

    def outputs(attention):
        given = (query, key, value, bias) if biased else (query, key, value)
        return jax.jit(lambda: attention(*given))(), jax.jit(lambda: value_and_gradients(attention, g, *given))()

    # Without gradients another form runs than with them.
    alone, ours = outputs(kernels.attention)
    expected, xla = outputs(jax.nn.dot_product_attention)
    assert alone.dtype == expected.dtype
    for a, b in zip((alone, *ours), (expected, *xla), strict=True):
        assert a.dtype == b.dtype
        scale = float(abs(b).max())
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=0, atol=tolerance * scale)


def test_attention_of_large_logits_is_finite():
    x = jnp.full((1, 4, 1, 2), 1e4)
    y, *gradients = value_and_gradients(kernels.attention, jnp.ones_like(x), x, x, x)
    np.testing.assert_allclose(y, x)
    assert all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize(
    "size, kernel, multiplier, stride",
    [
        ((6, 9), 3, 1, 1),
        ((6, 9), 3, 2, 1),
        ((7, 8), 3, 4, 1),
        ((7, 8), 3, 1, 2),
        ((6, 9), 3, 2, 2),
        ((6, 8), 3, 4, 2),
        ((7, 8), 5, 2, 1),
        ((6, 9), 5, 1, 2),
        ((8, 12), 3, 1, 2),
        ((8, 12), 5, 2, 2),
        ((2, 1), 5, 1, 2),
        ((8, 7), 5, 1, 3),
        ((7, 10), 1, 2, 3),
    ],
)
def test_depthwise_conv_and_its_gradients(size, kernel, multiplier, stride, padding):
    height, width = size
    x, w = normal(0, 2, height, width, 3), normal(1, kernel, kernel, 1, 3 * multiplier)
    g = normal(2, 2, -(-height // stride), -(-width // stride), 3 * multiplier)

    def outputs(convolution):
        return value_and_gradients(lambda x, w: convolution(x, w, stride, padding), g, x, w)

    ours, expected = jax.jit(lambda: (outputs(kernels.depthwise_conv), outputs(xla)))()
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_the_form_for_accelerators(stride):
    x, w, g = normal(0, 2, 6, 8, 3), normal(1, 3, 3, 1, 6), normal(2, 2, 6 // stride, 8 // stride, 6)
    ours = kernels._plain_vjp(x, w, g, stride, ((1, 1),) * 2, 3)
    for a, b in zip(ours, value_and_gradients(lambda x, w: xla(x, w, stride), g, x, w)[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("pad", [((1, 1), (1, 1)), ((0, 1), (2, 0))])
def test_the_form_for_accelerators_finds_its_map_within_the_padded_one(pad):
    x = normal(0, 2, 4, 5, 3)
    np.testing.assert_array_equal(kernels._unpadded(kernels._padded(x, pad), pad), x)


def test_depthwise_conv_by_its_definition():
    x, w = normal(0, 1, 4, 5, 2), normal(1, 3, 3, 1, 4)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = np.zeros((1, 2, 3, 4))
    for row, column, out in np.ndindex(2, 3, 4):  # outputs 0, 1 read channel 0, outputs 2, 3 channel 1
        window = padded[0, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3, out // 2]
        y[0, row, column, out] = (window * w[:, :, 0, out]).sum()
    np.testing.assert_allclose(kernels.depthwise_conv(x, w, 2), y, rtol=1e-5, atol=1e-5)


def test_depthwise_conv_is_the_form_that_the_platform_does_best():
    def step(x, w):
        return jax.grad(lambda x, w: kernels.depthwise_conv(x, w).sum(), (0, 1))(x, w)

    traced = jax.jit(step).trace(jnp.zeros((2, 8, 8, 4)), jnp.zeros((3, 3, 1, 4)))
    assert "stablehlo.convolution" not in traced.lower(lowering_platforms=("cpu",)).as_text()
    for platform in ("cuda", "tpu"):
        assert "stablehlo.convolution" in traced.lower(lowering_platforms=(platform,)).as_text()


def test_depthwise_conv_keeps_bfloat16():
    x, w = jnp.asarray(normal(0, 2, 6, 6, 4), jnp.bfloat16), jnp.asarray(normal(1, 3, 3, 1, 8))
    y = kernels.depthwise_conv(x, w, 2)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), xla(x.astype(jnp.float32), w, 2), rtol=0.05, atol=0.1)
    d_x, d_w = jax.eval_shape(jax.grad(lambda x, w: kernels.depthwise_conv(x, w, 2).sum(), (0, 1)), x, w)
    assert d_x.dtype == jnp.bfloat16 and d_w.dtype == jnp.float32


@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize("channels", [3, 6])  # an image's, and a map's
@pytest.mark.parametrize(
    "size, kernel, stride",
    [((8, 12), 3, 2), ((2, 2), 3, 2), ((7, 8), 3, 2), ((7, 8), 3, 1), ((1, 2), 3, 1), ((6, 9), 5, 1),
     ((8, 9), 7, 2), ((8, 7), 5, 3)],
)  # fmt: skip
def test_convolution_and_its_gradients(size, kernel, stride, channels, padding):
    x, w = normal(0, 2, *size, channels), normal(1, kernel, kernel, channels, 8)
    g = normal(2, 2, *(-(-n // stride) for n in size), 8)

    def outputs(convolution):
        return value_and_gradients(lambda x, w: convolution(x, w, stride, padding), g, x, w)

    ours, expected = jax.jit(lambda: (outputs(kernels.conv), outputs(xla)))()
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


def test_convolution_keeps_types():
    x, w = jnp.asarray(normal(0, 2, 6, 6, 8), jnp.bfloat16), normal(1, 3, 3, 8, 8)
    g = jnp.asarray(normal(2, 2, 6, 6, 8), jnp.bfloat16)
    y, d_x, d_w = value_and_gradients(lambda x, w: kernels.conv(x, w.astype(x.dtype)), g, x, w)
    assert (y.dtype, d_x.dtype, d_w.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    expected = value_and_gradients(lambda x, w: xla(x, w, 1), np.float32(g), np.float32(x), w)
    for a, b in zip((y, d_x, d_w), expected, strict=True):
        np.testing.assert_allclose(np.float32(a), b, rtol=0, atol=0.02 * abs(b).max())


def test_convolution_of_images_is_over_cells_on_a_cpu_alone():
    traced = jax.jit(lambda x, w: kernels.conv(x, w, 2)).trace(jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 4)))
    for platform, strides in (("cpu", False), ("cuda", True), ("tpu", True)):
        assert ("stride = [2, 2]" in traced.lower(lowering_platforms=(platform,)).as_text()) == strides


@pytest.mark.parametrize(
    "size, kernel, stride, expected",
    [
        ((8, 12), 3, 2, ((0, 1), (0, 1))),
        ((8, 12), 5, 2, ((1, 2), (1, 2))),
        ((7, 12), 3, 2, ((1, 1), (0, 1))),
        ((7, 12), 5, 1, ((2, 2), (2, 2))),
        ((1, 2), 5, 2, ((2, 2), (1, 2))),
        ((8, 7), 1, 2, ((0, 0), (0, 0))),
    ],
)
def test_pads_of_same_are_the_least_and_the_odd_one_comes_after(size, kernel, stride, expected):
    assert kernels.pads(size, kernel, stride, "same") == expected
    assert kernels.pads(size, kernel, stride, "symmetric") == ((kernel // 2, kernel // 2),) * 2
    with pytest.raises(ValueError, match="padding is 'valid'; a convolution's is 'symmetric' or 'same'"):
        kernels.pads(size, kernel, stride, "valid")


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("channels", [1, 6, 32])
def test_dynamic_relu_and_its_gradients(channels, dtype, tolerance):
    inputs = normal(0, 2, 5, 3, channels), normal(1, 2, channels), normal(2, 2, channels), normal(3, 2, 5, 3, channels)
    x, a1, a2, g = (jnp.asarray(given, dtype) for given in inputs)

    def plain(x, a1, a2):
        return jnp.maximum(a1[:, None, None] * x, a2[:, None, None] * x)

    ours = jax.jit(lambda: value_and_gradients(kernels.dynamic_relu, g, x, a1, a2))()
    for_accelerators = kernels._larger(x, a1, a2), *kernels._larger_vjp(x, a1, a2, g)
    expected = value_and_gradients(plain, np.float32(g), *(np.float32(given) for given in (x, a1, a2)))
    for form in (ours, for_accelerators):
        for a, b in zip(form, expected, strict=True):
            assert a.dtype == dtype
            np.testing.assert_allclose(np.float32(a), b, rtol=0, atol=tolerance * abs(b).max())


def test_dynamic_relu_at_zero_is_a_relu_where_its_slopes_are_one_and_zero():
    one, zero = jnp.ones((1, 2)), jnp.zeros((1, 2))
    for slopes in ((one, zero), (zero, one)):
        gradient = jax.grad(lambda x: kernels.dynamic_relu(x, *slopes).sum())(jnp.zeros((1, 3, 3, 2)))
        np.testing.assert_array_equal(gradient, 0.0)


def test_dynamic_relu_is_the_form_that_the_platform_does_best():
    traced = jax.jit(kernels.dynamic_relu).trace(jnp.zeros((2, 4, 4, 6)), jnp.zeros((2, 6)), jnp.zeros((2, 6)))
    for platform, product in (("cpu", True), ("cuda", False), ("tpu", False)):
        assert ("dot_general" in traced.lower(lowering_platforms=(platform,)).as_text()) == product


@pytest.mark.parametrize("size", [(8, 6), (7, 9), (1, 2)])
def test_max_pool_has_the_gradient_of_xla(size):
    x = np.maximum(normal(0, 2, *size, 3), 0.0)  # with ties, as after a ReLU
    g = normal(1, 2, *(-(-n // 2) for n in size), 3)

    functions = (kernels.max_pool, kernels.max_pool.fun)
    ours, expected = jax.jit(lambda: tuple(value_and_gradients(function, g, x) for function in functions))()
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
