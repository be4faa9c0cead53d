"""Shared blocks against their definitions."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from qbheat_jax.device_mesh import AXES
from qbheat_jax.models import layers


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def variables_of(module, *args):
    """Variables of the module's shapes, drawn by numpy, so that there is nothing to compile."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(lambda: module.init(jax.random.key(0), *args)))
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)
    return jax.tree.unflatten(tree, [0.3 * normal(seed, *leaf.shape) for seed, leaf in enumerate(leaves)])


@pytest.mark.parametrize("kernel, stride, groups", [(1, 1, 1), (1, 1, 2), (1, 2, 1), (3, 2, 1), (3, 2, 4), (5, 2, 2)])
@pytest.mark.parametrize("size", [(8, 12), (7, 8)])
def test_conv_pads_as_tensorflow_on_demand(size, kernel, stride, groups):
    x = normal(0, 1, *size, 4)
    conv = layers.Conv(8, kernel, stride, groups, padding="same")
    variables = variables_of(conv, x)
    w = variables["params"]["kernel"]
    expected = jax.lax.conv_general_dilated(
        x, w, (stride, stride), "SAME", None, None, ("NHWC", "HWIO", "NHWC"), groups
    )
    np.testing.assert_allclose(jax.jit(conv.apply)(variables, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel, stride, groups", [(1, 1, 1), (1, 1, 2), (1, 2, 1), (3, 2, 1), (3, 2, 4), (7, 2, 1)])
def test_conv_pads_alike_on_every_side(kernel, stride, groups):
    x = normal(0, 1, 8, 7, 4)
    conv = layers.Conv(8, kernel, stride, groups)
    variables = variables_of(conv, x)
    w = variables["params"]["kernel"]
    assert w.shape == (kernel, kernel, 4 // groups, 8)
    expected = jax.lax.conv_general_dilated(
        x, w, (stride, stride), [(kernel // 2,) * 2] * 2, None, None, ("NHWC", "HWIO", "NHWC"), groups
    )
    np.testing.assert_allclose(jax.jit(conv.apply)(variables, x), expected, rtol=1e-5, atol=1e-5)


def test_conv_init_by_fan_out():
    kernel = jax.jit(lambda: layers.conv_init(jax.random.key(0), (3, 3, 64, 128)))()
    assert kernel.dtype == jnp.float32
    assert float(np.std(kernel)) == pytest.approx(math.sqrt(2 / (9 * 128)), rel=0.02)
    assert abs(float(np.mean(kernel))) < 1e-3


def test_channel_shuffle_by_its_definition():
    x = np.arange(12)
    np.testing.assert_array_equal(layers.channel_shuffle(x, 3), [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11])
    maps = normal(0, 2, 3, 3, 12)
    shuffled = layers.channel_shuffle(maps, 4)  # output k * 4 + g is input g * 3 + k
    for group, k in np.ndindex(4, 3):
        np.testing.assert_array_equal(shuffled[..., k * 4 + group], maps[..., group * 3 + k])


def test_sincos_2d_separates_rows_and_columns():
    code = layers.sincos_2d(5, 7, 16)
    assert code.shape == (5, 7, 16) and code.dtype == np.float32
    columns, rows = code[..., :8], code[..., 8:]
    assert np.ptp(columns, axis=0).max() == 0 and np.ptp(rows, axis=1).max() == 0
    np.testing.assert_array_equal(columns[0, :5], rows[:, 0])  # one code for both
    np.testing.assert_array_equal(columns[0, 0], [0, 0, 0, 0, 1, 1, 1, 1])
    np.testing.assert_allclose(columns[0, 3, [0, 3, 4, 7]], [*np.sin([3, 0.003]), *np.cos([3, 0.003])], rtol=1e-6)
    assert len(np.unique(code.reshape(-1, 16), axis=0)) == 35
    np.testing.assert_array_equal(layers.sincos_2d(10, 14, 16)[:5, :7], code)  # by absolute index
    with pytest.raises(ValueError, match="a multiple of 4 channels, not 18"):
        layers.sincos_2d(2, 2, 18)


def test_drop_path_drops_whole_examples_and_keeps_the_expectation():
    x = jnp.ones((4000, 2, 3))
    drop = layers.DropPath(0.25)
    y = np.asarray(drop.apply({}, x, True, rngs={"drop_path": jax.random.key(0)}))
    assert np.ptp(y, axis=(1, 2)).max() == 0
    np.testing.assert_allclose(np.unique(y), [0, 4 / 3], rtol=1e-6)
    assert y.mean() == pytest.approx(1, abs=0.04)  # 4 standard deviations


def test_drop_path_is_the_identity_where_nothing_is_dropped():
    x = normal(0, 4, 2, 3)
    np.testing.assert_array_equal(layers.DropPath(0.9).apply({}, x, False), x)
    np.testing.assert_array_equal(layers.DropPath(0.0).apply({}, x, True), x)  # and needs no key


def test_batch_norm_momentum_and_epsilon():
    x = 0.02 + 0.01 * normal(0, 16, 4, 4, 2)  # a variance at which eps shows
    variables = {
        "params": {"scale": np.ones(2, np.float32), "bias": np.zeros(2, np.float32)},
        "batch_stats": {"mean": np.zeros(2, np.float32), "var": np.ones(2, np.float32)},
    }
    norm = layers.BatchNorm(use_running_average=False)
    y, updated = jax.jit(lambda v, x: norm.apply(v, x, mutable="batch_stats"))(variables, x)
    mean, variance = x.mean((0, 1, 2), np.float64), x.var((0, 1, 2), np.float64)
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(variance + 1e-5), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(updated["batch_stats"]["mean"], 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(updated["batch_stats"]["var"], 0.9 + 0.1 * variance, rtol=1e-4)


def test_conv_bn_hands_padding_momentum_and_epsilon_on():
    x = 0.05 * normal(0, 2, 6, 4, 3)  # variances at which eps shows
    module = layers.ConvBN(5, 3, 2, padding="same", momentum=0.99, epsilon=1e-3)
    variables = variables_of(module, x, True)
    p, before = variables["params"], variables["batch_stats"]["bn"]
    y, updated = jax.jit(lambda x: module.apply(variables, x, True, mutable="batch_stats"))(x)
    z = layers.Conv(5, 3, 2, padding="same").apply({"params": p["conv"]}, x)
    mean, variance = np.mean(z, (0, 1, 2)), np.var(z, (0, 1, 2))
    expected = (z - mean) / np.sqrt(variance + 1e-3) * p["bn"]["scale"] + p["bn"]["bias"]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    after = updated["batch_stats"]["bn"]
    np.testing.assert_allclose(after["mean"], 0.99 * before["mean"] + 0.01 * mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(after["var"], 0.99 * before["var"] + 0.01 * variance, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype, least", [(jnp.float32, 2e-5), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize("use_running_average", [False, True])
def test_batch_norm_is_flax_batch_norm_with_its_gradients(use_running_average, dtype, least):
    x, g = 3.0 * normal(0, 4, 5, 6, 8) + 2.0, normal(1, 4, 5, 6, 8)
    fields = dict(use_running_average=use_running_average, momentum=0.9, epsilon=1e-3, dtype=dtype)

    def outputs(module):
        variables = nn.BatchNorm(**fields).init(jax.random.key(0), x)
        params = jax.tree.map(lambda leaf: leaf + 0.5, variables["params"])
        stats = jax.tree.map(lambda leaf: leaf + 0.25, variables["batch_stats"])

        def apply(params, x):
            return module.apply({"params": params, "batch_stats": stats}, x.astype(dtype), mutable=["batch_stats"])

        y, vjp, updated = jax.vjp(apply, params, x, has_aux=True)
        return y, updated, vjp(g.astype(dtype))

    ours, flax = jax.jit(lambda: (outputs(layers.BatchNorm(**fields)), outputs(nn.BatchNorm(**fields))))()
    assert ours[0].dtype == flax[0].dtype == dtype
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(flax), strict=True):
        a, b = (np.asarray(leaf, np.float32) for leaf in (a, b))
        np.testing.assert_allclose(a, b, rtol=least, atol=least * np.abs(b).max())


def test_batch_norm_statistics_stay_float32():
    x = jnp.zeros((2, 4, 4, 3), jnp.bfloat16)
    module = layers.ConvBN(4, dtype=jnp.bfloat16)
    variables = variables_of(module, x, True)
    y, updated = jax.eval_shape(lambda: module.apply(variables, x, True, mutable="batch_stats"))
    assert y.dtype == jnp.bfloat16
    assert [leaf.dtype for leaf in jax.tree.leaves(updated)] == [jnp.float32] * 2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dense_is_flax_dense_with_the_same_parameters(dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 5)), jnp.float32)
    plain, flat = nn.Dense(7, dtype=dtype), layers.Dense(7, dtype=dtype)
    variables = plain.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, flat.init(jax.random.key(0), x))

    def outputs(module):
        y, pull = jax.vjp(module.apply, variables, x)
        assert y.dtype == dtype and y.shape == (2, 3, 4, 7)
        return y, *pull(jnp.ones_like(y))

    tolerance = {"rtol": 0.05, "atol": 0.1} if dtype == jnp.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), outputs(flat), outputs(plain))


def test_attend_is_softmax_attention_over_contiguous_heads():
    query, key, value = normal(0, 2, 3, 8), normal(1, 2, 5, 8), normal(2, 2, 5, 8)
    expected = []
    for part in (slice(0, 4), slice(4, 8)):
        scores = np.einsum("bnc,bmc->bnm", query[..., part], key[..., part]) / 2.0
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        expected.append(weights @ value[..., part])
    ours = jax.jit(lambda *qkv: layers.attend(*qkv, 2))(query, key, value)
    np.testing.assert_allclose(ours, np.concatenate(expected, -1), rtol=1e-5, atol=1e-5)


def on(platform, **axes):
    """As `state.train_step` makes a mesh known while a step is traced."""
    shape = tuple(axes.get(axis, 1) for axis in AXES)
    device = jax.sharding.AbstractDevice(device_kind="", num_cores=None, platform=platform)
    mesh = jax.sharding.AbstractMesh(shape, AXES, (AxisType.Auto,) * len(AXES), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def test_attend_takes_a_few_examples_at_a_time_on_tpus(monkeypatch):
    monkeypatch.setattr(layers, "_LOGITS", 4 * 2 * 3 * 5 * 2)  # of two examples
    query, key, value, toward = normal(0, 12, 3, 8), normal(1, 12, 5, 8), normal(2, 12, 5, 8), normal(3, 12, 3, 8)

    def outputs(bias=None):
        y, pull = jax.vjp(lambda *qkv: layers.attend(*qkv, 2, bias), query, key, value)
        return y, *pull(toward)

    def loops(bias=None):
        return str(jax.make_jaxpr(lambda: outputs(bias))()).count("scan[")

    whole = outputs()
    for platform in ("cpu", "cuda"):
        with on(platform, data=3):
            assert loops() == 0
    for axes, parts in (({"data": 3}, 2), ({"data": 2, "fsdp": 2}, 3), ({}, 6), ({"model": 2}, 3), ({"data": 5}, 1)):
        with on("tpu", **axes):
            assert layers._parts(12, 3, 5, 2) == parts, axes
            assert loops() == (2 if parts > 1 else 0)
            for ours, theirs in zip(jax.jit(outputs)(), whole, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    with on("tpu"):
        assert loops(normal(4, 12, 2, 3, 5)) == 0


def test_attend_leaves_a_mesh_that_is_not_ours_alone():
    device = jax.sharding.AbstractDevice(device_kind="", num_cores=None, platform="tpu")
    mesh = jax.sharding.AbstractMesh((2,), ("batch",), (AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert layers._parts(12, 1024, 1024, 2) == 1


def test_transformer_block_is_pre_norm():
    x = 5.0 + normal(0, 2, 6, 8)
    block = layers.TransformerBlock(heads=2, mlp_ratio=2.0)
    variables = variables_of(block, x, False)
    p = variables["params"]

    def norm(x, layer):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * layer["scale"] + layer["bias"]

    def linear(x, layer):
        return x @ layer["kernel"] + layer["bias"]

    qkv = np.split(linear(norm(x, p["norm1"]), p["attn"]["qkv"]), 3, -1)
    y = x + linear(np.asarray(layers.attend(*qkv, 2)), p["attn"]["proj"])
    hidden = linear(norm(y, p["norm2"]), p["fc1"])
    hidden = hidden * np.vectorize(lambda v: 0.5 * (1 + math.erf(v / math.sqrt(2))))(hidden)
    result = jax.jit(lambda x: block.apply(variables, x, False))(x)
    np.testing.assert_allclose(result, y + linear(hidden, p["fc2"]), rtol=1e-5, atol=2e-5)


def test_dynamic_relu_starts_as_a_relu_and_follows_its_token():
    x, token = normal(0, 2, 3, 3, 4), normal(1, 2, 8)
    relu = layers.DyReLU()
    variables = variables_of(relu, x, token)
    params = variables["params"]
    assert params["fc0"]["kernel"].shape == (8, 2) and params["fc2"]["kernel"].shape == (2, 8)
    apply = jax.jit(lambda params: relu.apply({"params": params}, x, token))
    still = jax.tree.map(np.zeros_like, params)
    np.testing.assert_allclose(apply(still), np.maximum(x, 0), atol=1e-6)
    # hard sigmoid of a bias 3 is 1 and of -3 is 0: a1 = 2, a2 = -1
    still["fc2"]["bias"] = np.float32([3, 3, 3, 3, -3, -3, -3, -3])
    np.testing.assert_allclose(apply(still), np.maximum(2 * x, -x), rtol=1e-5)
    hidden = np.maximum(token @ params["fc0"]["kernel"] + params["fc0"]["bias"], 0)
    gains = np.clip((hidden @ params["fc2"]["kernel"] + params["fc2"]["bias"] + 3) / 6, 0, 1)[:, None, None]
    expected = np.maximum(x * (2 * gains[..., :4]), x * (2 * gains[..., 4:] - 1))
    np.testing.assert_allclose(apply(params), expected, rtol=1e-4, atol=1e-5)
