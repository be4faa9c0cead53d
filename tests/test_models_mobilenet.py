"""MobileNetV2 and EfficientNet-Lite0: their sizes and shapes, a block by its definition, and what training needs."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qbheat_jax.models.layers import ConvBN
from qbheat_jax.models.mobilenet import VARIANTS, InvertedResidual, MobileNet, Variant

V2, LITE0 = VARIANTS["mobilenet_v2"], VARIANTS["efficientnet_lite0"]
BOTH = pytest.mark.parametrize("variant", [V2, LITE0], ids=VARIANTS)


def shapes_of(module, *args):
    return jax.eval_shape(lambda: module.init(jax.random.key(0), *args))


def variables_of(module, *args):
    random = np.random.default_rng(0)

    def draw(path, leaf):  # variances in 0.5 .. 1.5, all else in -0.5 .. 0.5
        return random.uniform(0.5, 1.5, leaf.shape).astype(np.float32) - (path[-1].key != "var")

    return jax.tree_util.tree_map_with_path(draw, shapes_of(module, *args))


# Those of the releases, without their 1280 x 1000 + 1000 classifier.
@pytest.mark.parametrize("variant, parameters", [(V2, 2_223_872), (LITE0, 3_371_008)], ids=VARIANTS)
def test_size_of_the_trunk(variant, parameters):
    params = shapes_of(MobileNet(variant), jnp.zeros((1, 32, 32, 3)))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters


def test_blocks_have_the_numbers_of_the_releases():
    v2, lite0 = (shapes_of(MobileNet(v), jnp.zeros((1, 32, 32, 3)))["params"] for v in (V2, LITE0))
    assert set(v2) == {"stem", "last"} | {f"block{n}" for n in range(1, 18)}
    assert set(lite0) == {"stem", "last"} | {f"block{n}" for n in range(16)}
    assert set(v2["block1"]) == set(lite0["block0"]) == {"depthwise", "project"}
    assert set(v2["block2"]) == set(lite0["block1"]) == {"expand", "depthwise", "project"}
    assert {part for layer in v2["block2"].values() for part in layer} == {"conv", "bn"}
    assert v2["block17"]["depthwise"]["conv"]["kernel"].shape == (3, 3, 1, 960)
    assert lite0["block3"]["depthwise"]["conv"]["kernel"].shape == (5, 5, 1, 144)


@BOTH
@pytest.mark.parametrize("last_stride, stride", [(2, 32), (1, 16)])
def test_shapes_at_every_stride(variant, last_stride, stride):
    encoder = MobileNet(variant, last_stride=last_stride)
    assert (encoder.stride, encoder.width) == (stride, 1280)
    (features, out), variables = jax.eval_shape(
        lambda: encoder.init_with_output(jax.random.key(0), jnp.zeros((2, 64, 96, 3)))
    )
    assert features.shape == (2, 64 // stride, 96 // stride, 1280)
    assert out["stem"].shape == (2, 32, 48, 32)
    *_, before, last = (out[f"block{variant.first + n}"].shape for n in range(sum(row[2] for row in variant.rows)))
    assert before[1:3] == last[1:3] == features.shape[1:3] and last[3] == 320
    assert len(out) == 1 + sum(row[2] for row in variant.rows)
    # The weights do not know of the stride.
    own = shapes_of(MobileNet(variant), jnp.zeros((1, 32, 32, 3)))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, own)


@BOTH
def test_at_stride_16_one_stage_alone_does_not_stride(variant):
    images = jnp.zeros((1, 64, 64, 3))
    sizes = []
    for last_stride in (2, 1):
        encoder = MobileNet(variant, last_stride=last_stride)
        out = jax.eval_shape(lambda encoder=encoder: encoder.init_with_output(jax.random.key(0), images))[0][1]
        sizes.append({name: x.shape[1] for name, x in out.items()})
    assert {size for name, size in sizes[0].items() if size != sizes[1][name]} == {2}
    assert min(sizes[1].values()) == 4


@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize(
    "expansion, channels, stride, kernel", [(6, 4, 1, 3), (6, 8, 1, 3), (3, 4, 2, 5), (1, 4, 1, 3)]
)
def test_block_by_its_definition(padding, expansion, channels, stride, kernel):
    x = np.random.default_rng(1).normal(size=(2, 6, 8, 4)).astype(np.float32)
    conv = functools.partial(ConvBN, padding=padding, epsilon=1e-3)
    block = InvertedResidual(conv, expansion, channels, stride, kernel)
    variables = variables_of(block, x, False)

    def layer(name, x, strides=1, groups=1):
        p, s = variables["params"][name], variables["batch_stats"][name]["bn"]
        side = p["conv"]["kernel"].shape[0] // 2
        pad = "SAME" if padding == "same" else [(side, side)] * 2
        x = jax.lax.conv_general_dilated(
            x, p["conv"]["kernel"], (strides,) * 2, pad, None, None, ("NHWC", "HWIO", "NHWC"), groups
        )
        return (x - s["mean"]) / np.sqrt(s["var"] + 1e-3) * p["bn"]["scale"] + p["bn"]["bias"]

    y = np.clip(layer("expand", x), 0, 6) if expansion > 1 else x
    y = layer("project", np.clip(layer("depthwise", y, stride, y.shape[-1]), 0, 6))
    y = y + x if stride == 1 and channels == 4 else y
    np.testing.assert_allclose(jax.jit(lambda: block.apply(variables, x, False))(), y, rtol=1e-4, atol=1e-4)


def test_each_net_pads_and_normalises_as_its_release():
    layers = []

    def record(next_call, args, kwargs, context):
        if isinstance(context.module, ConvBN):
            layers.append((context.module.padding, context.module.momentum, context.module.epsilon))
        return next_call(*args, **kwargs)

    for variant, known in ((V2, ("symmetric", 0.9, 1e-5)), (LITE0, ("same", 0.99, 1e-3))):
        layers.clear()
        with nn.intercept_methods(record):
            shapes_of(MobileNet(variant), jnp.zeros((1, 32, 32, 3)))
        assert set(layers) == {known}


def test_training_in_bfloat16_updates_every_statistic():
    small = Variant(((1, 8, 1, 1, 3), (2, 12, 2, 2, 5), (2, 16, 1, 2, 3)), padding="same")
    encoder = MobileNet(small, dtype=jnp.bfloat16, drop_path=0.2)
    images = np.random.default_rng(1).normal(size=(2, 32, 64, 3)).astype(np.float32)
    variables = variables_of(encoder, images)
    rngs = {"drop_path": jax.random.key(0)}
    apply = jax.jit(lambda x: encoder.apply(variables, x, True, mutable=["batch_stats"], rngs=rngs))
    (features, out), updated = apply(images)
    assert {leaf.dtype for leaf in jax.tree.leaves((features, out))} == {jnp.dtype(jnp.bfloat16)}
    assert np.isfinite(np.float32(features)).all() and float(features.max()) <= 6
    before, after = variables["batch_stats"], updated["batch_stats"]
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype(jnp.float32)}
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: (a != b).any(), before, after)))


@BOTH
def test_drop_path_grows_linearly_over_the_blocks_with_a_shortcut(variant):
    rates = []

    def record(next_call, args, kwargs, context):
        if type(context.module).__name__ == "DropPath":
            rates.append(context.module.rate)
        return next_call(*args, **kwargs)

    with nn.intercept_methods(record):
        shapes_of(MobileNet(variant, drop_path=0.3), jnp.zeros((1, 32, 32, 3)))
    count = sum(row[2] for row in variant.rows)
    joined, n = [], 0
    for row in variant.rows:
        joined += range(n + 1, n + row[2])  # all but a stage's first
        n += row[2]
    np.testing.assert_allclose(rates, [0.3 * n / (count - 1) for n in joined])


@pytest.mark.parametrize("last_stride, size", [(2, 80), (1, 72)])
def test_refusals(last_stride, size):
    with pytest.raises(ValueError, match=f"images of 64 x {size} pixels .* must be multiples of {16 * last_stride}"):
        shapes_of(MobileNet(V2, last_stride), jnp.zeros((1, 64, size, 3)))
