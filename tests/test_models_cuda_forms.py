"""The forms that CUDA is given, run here and compared with the plain ones; and that each platform is given its own."""

import functools
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qbheat_jax import methods
from qbheat_jax.models import kernels, layers
from qbheat_jax.tools.bench import training
from qbheat_jax.train import optim, runtime
from tests import test_pods  # noqa: F401, registers resnet_micro


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def compare(ours, plain, inputs, tolerance):
    """Values and gradients of two functions of the same inputs agree, `tolerance` relative to their largest number."""
    y, vjp = jax.vjp(ours, *inputs)
    expected, plain_vjp = jax.vjp(plain, *inputs)
    gradient = jax.tree.map(lambda x: jnp.asarray(normal(9, *x.shape), x.dtype), expected)
    pairs = zip(jax.tree.leaves((y, vjp(gradient))), jax.tree.leaves((expected, plain_vjp(gradient))), strict=True)
    for a, b in pairs:
        assert a.dtype == b.dtype and a.shape == b.shape
        scale = float(jnp.abs(b.astype(jnp.float32)).max())
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=0, atol=tolerance * scale)


def lowered(function, *inputs, platform="cuda"):
    """The program's text for a platform that need not be here."""
    return jax.jit(function).trace(*inputs).lower(lowering_platforms=(platform,)).as_text()


TYPES = pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])


@TYPES
def test_layer_norm_of_rows(dtype, tolerance):
    x, scale, bias = jnp.asarray(3 + 2 * normal(0, 6, 40), dtype), 1 + normal(1, 40), normal(2, 40)
    module = nn.LayerNorm(epsilon=1e-6, dtype=dtype)
    compare(
        lambda x, scale, bias: layers._layer_norm_of_rows(x, scale, bias, 1e-6, jnp.dtype(dtype)),
        lambda x, scale, bias: module.apply({"params": {"scale": scale, "bias": bias}}, x),
        (x, scale, bias),
        tolerance,
    )


@TYPES
def test_layer_norm_is_flax_layer_norm(dtype, tolerance):
    x = jnp.asarray(normal(0, 2, 5, 24), dtype)
    ours, flax = (module(epsilon=1e-5, dtype=jnp.dtype(dtype)) for module in (layers.LayerNorm, nn.LayerNorm))
    variables = flax.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, ours.init(jax.random.key(0), x)) == jax.tree.map(jnp.shape, variables)
    compare(functools.partial(ours.apply, variables), functools.partial(flax.apply, variables), (x,), tolerance)


def test_gelu_of_its_input():
    x = jnp.linspace(-6.0, 6.0, 241)
    compare(layers._gelu_of_input, functools.partial(jax.nn.gelu, approximate=False), (x,), 1e-6)
    rounded = x.astype(jnp.bfloat16)
    exact = jax.nn.gelu(rounded.astype(jnp.float32), approximate=False)
    ours = layers._gelu_of_input(rounded)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(ours), exact, rtol=2**-8, atol=1e-6)


def test_a_residual_keeps_its_gradient():
    compare(lambda x, y: x + layers._held(y), jnp.add, (normal(0, 3, 4), normal(1, 3, 4)), 0.0)


def test_projections_by_one_product():
    inputs = normal(0, 2, 3, 8), normal(1, 8, 24), normal(2, 24)
    compare(layers.Projections._together, layers.Projections._apart, inputs, 1e-5)


@pytest.mark.parametrize("stride, multiplier", [(1, 3), (2, 2), (3, 2)])
def test_depthwise_kernel_gradient_at_once(stride, multiplier):
    x, kernel, pad = normal(0, 2, 7, 9, 4), normal(1, 3, 3, 1, 4 * multiplier), ((1, 1), (1, 1))
    padded, gradient = kernels._padded(x, pad), normal(2, *kernels._grouped(x, kernel, stride, pad).shape)
    ours = kernels._shifted_kernel_gradient_at_once(padded, gradient, 3, stride)
    _, expected = kernels._plain_vjp(x, kernel, gradient, stride, pad, 4)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-4)


def test_cuda_convolves_by_shifts_where_channels_have_several_outputs():
    x = jnp.zeros((1, 8, 8, 4), jnp.bfloat16)

    def text(outputs, platform="cuda"):
        return lowered(kernels.depthwise_conv, x, jnp.zeros((3, 3, 1, outputs)), platform=platform)

    assert "convolution" in text(4) and "convolution" not in text(8)
    assert "convolution" in text(8, "tpu") and "convolution" not in text(4, "cpu")


def test_a_strided_slice_is_held_apart_on_cuda_alone():
    x = jnp.zeros((1, 8, 8, 4))
    strided = functools.partial(kernels.strided, stride=2)
    assert "optimization_barrier" in lowered(strided, x)
    assert all("optimization_barrier" not in lowered(strided, x, platform=p) for p in ("cpu", "tpu"))
    np.testing.assert_array_equal(strided(jnp.arange(16.0).reshape(1, 4, 4, 1)).reshape(-1), [0, 2, 8, 10])


def attention_text(monkeypatch, has_cudnn, dtype="bfloat16", width=64, platform="cuda", biased=False):
    monkeypatch.setattr(kernels, "_has_cudnn", lambda: has_cudnn)
    query = jnp.zeros((2, 16, 2, width), dtype)
    bias = jnp.zeros((2, 2, 16, 16)) if biased else None
    return lowered(lambda q: kernels.attention(q, q, q, bias), query, platform=platform)


def test_attention_is_fused_where_cudnn_takes_it(monkeypatch):
    if not kernels._has_cudnn():
        pytest.skip("cuDNN is not installed: pip install nvidia-cudnn-cu13 (no GPU is needed)")
    text = functools.partial(attention_text, monkeypatch)
    assert "fmha" in text(True)
    assert "fmha" not in text(False)
    assert "fmha" not in text(True, dtype="float32") + text(True, width=12) + text(True, width=136) + text(
        True, biased=True
    )
    assert "fmha" not in text(True, platform="cpu") + text(True, platform="tpu")


@pytest.mark.parametrize("queries, keys", [(6, 8), (17, 17), (4, 9)])
def test_cudnn_is_given_even_numbers_of_cells(queries, keys, monkeypatch):
    """Cells that are added do not count: the plain form, asked the same, gives what it gives without them."""
    plain, asked = jax.nn.dot_product_attention, []

    def xla(query, key, value, implementation, **lengths):
        asked.append((query.shape[1], key.shape[1]))
        assert implementation == "cudnn"
        return plain(query, key, value, **lengths)

    query, key, value = normal(0, 2, queries, 3, 8), normal(1, 2, keys, 3, 8), normal(2, 2, keys, 3, 8)
    monkeypatch.setattr(jax.nn, "dot_product_attention", xla)
    compare(lambda *inputs: kernels._fused_attention(*inputs, None), plain, (query, key, value), 1e-5)
    assert all(n % 2 == 0 for pair in asked for n in pair)


def test_without_cudnn_attention_is_plain(monkeypatch):
    assert "fmha" not in attention_text(monkeypatch, False)


def test_norm_of_rows():
    tree = {"a": normal(0, 5, 7), "b": normal(1, 3), "c": normal(2, 3, 3, 2, 4), "d": np.float32(2.0).reshape(1)}
    expected = optax.tree.norm(tree)
    assert float(optim._norm_of_rows(tree)) == pytest.approx(float(expected), rel=1e-6)
    assert float(optim.global_norm(tree)) == pytest.approx(float(expected), rel=1e-6)


def test_gpu_flags_leave_the_users_own(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true --xla_a=1")
    assert runtime.gpu_flags() == "--xla_gpu_enable_triton_gemm=true --xla_a=1"
    monkeypatch.delenv("XLA_FLAGS")
    assert runtime.gpu_flags() == "--xla_gpu_enable_triton_gemm=false"


@pytest.mark.parametrize("vendor, changed", [(runtime.NVIDIA, True), (runtime.AMD, False)])
def test_only_a_gpu_of_nvidias_changes_flags(vendor, changed, monkeypatch):
    monkeypatch.setattr(runtime, "vendors", lambda: {vendor})
    monkeypatch.setenv("XLA_FLAGS", "")
    runtime.tune_gpu()
    assert bool(os.environ["XLA_FLAGS"]) == changed


@pytest.mark.parametrize(
    "encoder", ["micro", "vit_micro", "resnet_micro", pytest.param("resnet18", marks=pytest.mark.weekly)]
)
def test_a_whole_step_in_the_forms_of_cuda(encoder, small_config, monkeypatch):
    """Loss and gradients, float32, of a model in which every choice by platform falls on CUDA's form, cuDNN's apart."""
    config = small_config({"encoder.name": encoder, "quarter.placements": "corners", "image_size": 64, "batch_size": 4})
    objective = methods.build(config)
    batch = training.noise(config)
    variables = jax.jit(objective.init)(jax.random.key(0), batch)

    def outputs():
        def loss(params):
            return objective.loss(params, variables["batch_stats"], batch, jax.random.key(1))[0]

        return jax.jit(jax.value_and_grad(loss))(variables["params"])

    expected = outputs()
    chosen = []

    def cuda(*args, default=None, **forms):
        chosen.extend(forms)
        return forms.get("cuda", default)(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", cuda)
    monkeypatch.setattr(kernels, "_has_cudnn", lambda: False)
    ours = outputs()
    assert "cuda" in chosen
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected[1]))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * largest)


def test_cudnn_takes_an_odd_number_of_cells_in_parts_of_a_batch():
    """As under `bn_groups`, where each part of the batch is mapped over."""
    if not kernels._has_cudnn():
        pytest.skip("cuDNN is not installed: pip install nvidia-cudnn-cu13 (no GPU is needed)")
    query = jnp.zeros((2, 4, 3, 2, 16), jnp.bfloat16)

    def loss(query):
        return jax.vmap(lambda q: kernels.attention(q, q, q))(query).astype(jnp.float32).sum()

    assert "fmha" in lowered(jax.grad(loss), query)
