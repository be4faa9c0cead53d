"""ResNet: torchvision's sizes and names, a block and the stem against plain convolutions, strides, statistics."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qbheat_jax.models.resnet import ResNet, ResNetBlock

RESNET18 = {"blocks": (2, 2, 2, 2), "bottleneck": False}
RESNET50 = {"blocks": (3, 4, 6, 3)}


def shapes_of(module, *args):
    return jax.eval_shape(lambda: module.init(jax.random.key(0), *args))


def variables_of(module, *args):
    random = np.random.default_rng(0)

    def draw(path, leaf):  # variances in 0.5 .. 1.5, all else in -0.5 .. 0.5
        return random.uniform(0.5, 1.5, leaf.shape).astype(np.float32) - (path[-1].key != "var")

    return jax.tree_util.tree_map_with_path(draw, shapes_of(module, *args))


def convolve(x, kernel, stride=1):
    pad = [(kernel.shape[0] // 2,) * 2] * 2
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), pad, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def normalise(x, params, stats):
    return (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * params["scale"] + params["bias"]


@pytest.mark.parametrize("fields, parameters", [(RESNET18, 11_176_512), (RESNET50, 23_508_032)])
def test_size_of_the_trunk(fields, parameters):
    variables = shapes_of(ResNet(**fields), jnp.zeros((1, 32, 32, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == parameters


def test_names_are_torchvisions():
    params = shapes_of(ResNet(**RESNET50), jnp.zeros((1, 32, 32, 3)))["params"]
    layers = {f"layer{stage}_{n}" for stage, count in enumerate((3, 4, 6, 3), 1) for n in range(count)}
    assert set(params) == {"conv1", "bn1"} | layers
    block = {"conv1", "bn1", "conv2", "bn2", "conv3", "bn3"}
    assert set(params["layer4_1"]) == block and set(params["layer4_0"]) == block | {"downsample_0", "downsample_1"}
    assert params["layer1_0"]["downsample_0"]["kernel"].shape == (1, 1, 64, 256)
    assert params["layer4_0"]["conv2"]["kernel"].shape == (3, 3, 512, 512)


@pytest.mark.parametrize("bottleneck, strides", [(True, (1, 2, 1)), (False, (2, 1))])
def test_block_strides_in_its_first_3x3(bottleneck, strides):
    x = np.random.default_rng(1).normal(size=(1, 6, 7, 4)).astype(np.float32)
    block = ResNetBlock(2, 2, bottleneck)
    variables = variables_of(block, x, False)
    p, s = variables["params"], variables["batch_stats"]

    @jax.jit
    def expected(x):
        y = x
        for n, stride in enumerate(strides, 1):
            y = normalise(convolve(y, p[f"conv{n}"]["kernel"], stride), p[f"bn{n}"], s[f"bn{n}"])
            y = jnp.maximum(y, 0) if n < len(strides) else y
        shortcut = normalise(convolve(x, p["downsample_0"]["kernel"], 2), p["downsample_1"], s["downsample_1"])
        return jnp.maximum(y + shortcut, 0)

    y = jax.jit(lambda x: block.apply(variables, x, False))(x)
    assert y.shape == (1, 3, 4, 8 if bottleneck else 2)
    np.testing.assert_allclose(y, expected(x), rtol=1e-4, atol=1e-4)


def test_imagenet_stem_is_a_7x7_and_a_max_pool():
    images = np.random.default_rng(1).normal(size=(1, 32, 64, 3)).astype(np.float32)
    encoder = ResNet(blocks=(1, 1, 1, 1), bottleneck=False)
    variables = variables_of(encoder, images)
    p, s = variables["params"], variables["batch_stats"]
    stem = jax.jit(lambda x: encoder.apply(variables, x)[1]["stem"])(images)
    x = np.maximum(normalise(convolve(images, p["conv1"]["kernel"], 2), p["bn1"], s["bn1"]), 0)
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    pooled = np.array([[x[0, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((0, 1)) for j in range(16)] for i in range(8)])
    np.testing.assert_allclose(stem[0], pooled, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "stem_stride, last_stride, stride", [(4, 2, 32), (4, 1, 16), (2, 2, 16), (2, 1, 8), (1, 2, 8), (1, 1, 4)]
)
def test_shapes_at_every_stride(stem_stride, last_stride, stride):
    encoder = ResNet(**RESNET18, stem_stride=stem_stride, last_stride=last_stride)
    assert (encoder.stride, encoder.width) == (stride, 512)
    (features, out), _ = jax.eval_shape(lambda: encoder.init_with_output(jax.random.key(0), jnp.zeros((2, 64, 96, 3))))
    assert features.shape == out["stage4"].shape == (2, 64 // stride, 96 // stride, 512)
    assert out["stem"].shape == (2, 64 // stem_stride, 96 // stem_stride, 64)
    assert set(out) == {"stem", "stage1", "stage2", "stage3", "stage4"}


def test_resnet50_has_2048_channels():
    encoder = ResNet(**RESNET50, last_stride=1)
    features, _ = jax.eval_shape(lambda: encoder.init_with_output(jax.random.key(0), jnp.zeros((1, 64, 96, 3))))[0]
    assert features.shape == (1, 4, 6, encoder.width) and encoder.width == 2048


def test_refusals():
    with pytest.raises(ValueError, match="images of 64 x 80 pixels .* must be multiples of 32"):
        shapes_of(ResNet(**RESNET18), jnp.zeros((1, 64, 80, 3)))
    with pytest.raises(ValueError, match="stem_stride is 3; a ResNet stem has stride 1, 2 or 4"):
        shapes_of(ResNet(**RESNET18, stem_stride=3), jnp.zeros((1, 96, 96, 3)))


def test_zero_init_is_of_the_last_gain_of_a_block():
    x = jnp.zeros((1, 4, 4, 4))

    @jax.jit
    def gains():
        trees = [ResNetBlock(2, zero_init=zero).init(jax.random.key(0), x, False)["params"] for zero in (True, False)]
        return [{name: layer["scale"] for name, layer in tree.items() if "scale" in layer} for tree in trees]

    zeroed, plain = gains()
    names = ("bn1", "bn2", "bn3", "downsample_1")
    assert {name: set(zeroed[name].tolist()) for name in zeroed} == {**dict.fromkeys(names, {1.0}), "bn3": {0.0}}
    assert {name: set(plain[name].tolist()) for name in plain} == dict.fromkeys(names, {1.0})


def test_training_in_bfloat16_updates_every_statistic():
    encoder = ResNet(blocks=(1, 1, 1, 1), bottleneck=False, stem_stride=1, dtype=jnp.bfloat16)
    images = np.random.default_rng(1).normal(size=(2, 8, 16, 3)).astype(np.float32)
    variables = variables_of(encoder, images)
    apply = jax.jit(lambda x: encoder.apply(variables, x, True, mutable=["batch_stats"]))
    (features, _), updated = apply(images)
    assert features.dtype == jnp.bfloat16 and features.shape == (2, 1, 2, 512)
    assert np.isfinite(np.float32(features)).all()
    before, after = variables["batch_stats"], updated["batch_stats"]
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype(jnp.float32)}
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: (a != b).any(), before, after)))


def test_drop_path_grows_linearly():
    rates = []

    def record(next_call, args, kwargs, context):
        if type(context.module).__name__ == "DropPath":
            rates.append(context.module.rate)
        return next_call(*args, **kwargs)

    with nn.intercept_methods(record):
        shapes_of(ResNet(**RESNET18, drop_path=0.35), jnp.zeros((1, 32, 32, 3)))
    np.testing.assert_allclose(rates, np.arange(8) * 0.05, atol=1e-6)
