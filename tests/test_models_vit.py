"""ViT: the released sizes, patches and positions against their definition, the class token, shapes, refusals."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qbheat_jax.errors import UserError
from qbheat_jax.models import layers
from qbheat_jax.models.layers import sincos_2d
from qbheat_jax.models.vit import ViT, resample

SMALL = {"width": 16, "heads": 2, "patch": 8}


def shapes_of(module, *args):
    return jax.eval_shape(lambda: module.init(jax.random.key(0), *args))


def variables_of(module, *args):
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: random.normal(0, 0.3, leaf.shape).astype(np.float32), shapes_of(module, *args))


def count(module, size=224):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes_of(module, jnp.zeros((1, size, size, 3)))))


@pytest.mark.parametrize("width, heads", [(192, 3), (384, 6), (768, 12)])
@pytest.mark.parametrize("patch", [8, 16])
def test_size_of_the_trunk(width, heads, patch):
    block = 12 * width**2 + 13 * width
    expected = 12 * block + (3 * patch**2 + 1) * width + 2 * width
    assert count(ViT(width, heads, patch=patch), 32) == expected


@pytest.mark.parametrize("width, heads, timm", [(192, 3, 5_524_416), (384, 6, 21_665_664), (768, 12, 85_798_656)])
def test_size_with_class_token_and_learnt_positions_is_the_releases(width, heads, timm):
    vit = ViT(width, heads, class_token=True, position="learnt", grid=14)
    assert count(vit) == timm
    params = shapes_of(vit, jnp.zeros((1, 224, 224, 3)))["params"]
    assert params["pos_embed"].shape == (1, 197, width) and params["class_token"].shape == (1, 1, width)


@pytest.mark.parametrize("patch", [8, 16])
def test_shapes(patch):
    encoder = ViT(192, 3, patch=patch)
    assert (encoder.stride, encoder.width) == (patch, 192)
    (features, out), _ = jax.eval_shape(lambda: encoder.init_with_output(jax.random.key(0), jnp.zeros((2, 64, 96, 3))))
    assert features.shape == (2, 64 // patch, 96 // patch, 192)
    assert set(out) == {"patches", *(f"block{n}" for n in range(12))}
    assert {value.shape for value in out.values()} == {features.shape}


def test_patches_are_a_product_with_the_kernel_plus_the_position_code():
    images = np.random.default_rng(1).normal(size=(1, 16, 24, 3)).astype(np.float32)
    encoder = ViT(**SMALL, depth=0)
    variables = variables_of(encoder, images)
    features, out = jax.jit(lambda x: encoder.apply(variables, x))(images)
    p = variables["params"]
    kernel = p["patch_embed"]["kernel"].reshape(-1, 16)
    for row, column in np.ndindex(2, 3):
        pixels = images[0, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].reshape(-1)
        expected = pixels @ kernel + p["patch_embed"]["bias"] + sincos_2d(2, 3, 16)[row, column]
        np.testing.assert_allclose(out["patches"][0, row, column], expected, rtol=1e-4, atol=1e-4)
    x = np.asarray(out["patches"])
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(features, x * p["norm"]["scale"] + p["norm"]["bias"], rtol=1e-3, atol=1e-4)


def test_patch_kernel_starts_as_xavier_on_the_matrix():
    kernel = jax.jit(ViT(width=192, heads=3, depth=0).init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    kernel = kernel["params"]["patch_embed"]["kernel"]
    bound = np.sqrt(6 / (16 * 16 * 3 + 192))
    assert kernel.shape == (16, 16, 3, 192)
    assert 0.999 * bound < float(jnp.abs(kernel).max()) <= bound


def test_learnt_positions_of_a_smaller_input_are_the_top_left_of_the_table():
    encoder = ViT(**SMALL, depth=0, position="learnt", grid=(3, 4))
    images = np.zeros((1, 16, 24, 3), np.float32)
    variables = variables_of(encoder, images)
    table = variables["params"]["pos_embed"]
    assert table.shape == (1, 12, 16)
    table = table.reshape(3, 4, 16)
    _, out = jax.jit(lambda x: encoder.apply(variables, x))(images)
    bias = variables["params"]["patch_embed"]["bias"]
    np.testing.assert_allclose(out["patches"][0], table[:2, :3] + bias, rtol=1e-5, atol=1e-6)


def test_a_learnt_table_holds_the_class_tokens_position_first():
    encoder = ViT(**SMALL, depth=0, class_token=True, position="learnt", grid=3)
    images = np.zeros((1, 24, 16, 3), np.float32)
    variables = variables_of(encoder, images)
    p = variables["params"]
    assert p["pos_embed"].shape == (1, 10, 16)
    features, out = jax.jit(lambda x: encoder.apply(variables, x))(images)
    cells = p["pos_embed"][0, 1:].reshape(3, 3, 16)
    np.testing.assert_allclose(out["patches"][0], cells[:, :2] + p["patch_embed"]["bias"], rtol=1e-5, atol=1e-6)
    x = p["class_token"][0] + p["pos_embed"][0, :1]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(out["class_token"], x * p["norm"]["scale"] + p["norm"]["bias"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("old, new", [((14, 14), (16, 16)), ((14, 14), (7, 10)), ((7, 9), (24, 5)), ((3, 3), (1, 2))])
def test_resample_is_torchs_bicubic_with_antialiasing(old, new, extra):
    torch = pytest.importorskip("torch")
    table = np.random.default_rng(0).normal(size=(1, extra + old[0] * old[1], 6)).astype(np.float32)
    cells = torch.tensor(table[:, extra:].reshape(1, *old, 6).transpose(0, 3, 1, 2))
    cells = torch.nn.functional.interpolate(cells, new, mode="bicubic", align_corners=False, antialias=True)
    ours = np.asarray(resample(table, old, new))
    assert ours.shape == (1, extra + new[0] * new[1], 6) and ours.dtype == np.float32
    plain = np.asarray(resample(table, old, new, "bicubic"))
    whole = torch.tensor(table[:, extra:].reshape(1, *old, 6).transpose(0, 3, 1, 2))
    whole = torch.nn.functional.interpolate(whole, new, mode="bicubic", align_corners=False)
    np.testing.assert_allclose(plain[:, extra:], whole.permute(0, 2, 3, 1).reshape(1, -1, 6), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(ours[:, :extra], table[:, :extra])
    expected = cells.numpy().transpose(0, 2, 3, 1).reshape(1, -1, 6)
    np.testing.assert_allclose(ours[:, extra:], expected, rtol=0, atol=1e-5)


def test_resample_keeps_the_same_grid_and_what_is_even():
    table = np.random.default_rng(0).normal(size=(1, 13, 6)).astype(np.float32)
    np.testing.assert_array_equal(resample(table, (3, 4), (3, 4)), table)
    even = np.full((1, 13, 6), 0.25, np.float32)
    np.testing.assert_allclose(resample(even, (3, 4), (7, 2)), np.full((1, 15, 6), 0.25), rtol=1e-5)
    with pytest.raises(
        ValueError, match=r"13 positions is not that of a grid \(3, 3\): that has 9, or 10 with a class"
    ):
        resample(table, (3, 3), (4, 4))


def test_class_token_is_seen_by_the_patches_and_is_no_part_of_the_map():
    encoder = ViT(**SMALL, depth=1, class_token=True)
    images = np.random.default_rng(1).normal(size=(2, 16, 24, 3)).astype(np.float32)
    variables = variables_of(encoder, images)

    @jax.jit
    def apply(token):
        params = variables["params"] | {"class_token": token}
        features, out = encoder.apply({"params": params}, images)
        return features, out["class_token"], out["block0"]

    token = variables["params"]["class_token"]
    features, read, block = apply(token)
    assert features.shape == block.shape == (2, 2, 3, 16) and read.shape == (2, 16)
    p = variables["params"]["norm"]
    x = (block - block.mean(-1, keepdims=True)) / np.sqrt(block.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(features, x * p["scale"] + p["bias"], rtol=1e-3, atol=1e-3)
    assert not np.allclose(features, apply(-token)[0], atol=1e-3)


def test_bfloat16_keeps_float32_parameters():
    encoder = ViT(**SMALL, depth=1, class_token=True, position="learnt", grid=(2, 2), dtype=jnp.bfloat16)
    images = jnp.zeros((1, 16, 16, 3))
    (features, out), variables = jax.eval_shape(lambda: encoder.init_with_output(jax.random.key(0), images))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves((features, out))} == {jnp.dtype(jnp.bfloat16)}


def test_drop_path_grows_linearly():
    rates = []

    def record(next_call, args, kwargs, context):
        if type(context.module).__name__ == "DropPath":
            rates.append(context.module.rate)
        return next_call(*args, **kwargs)

    with nn.intercept_methods(record):
        shapes_of(ViT(**SMALL, depth=3, drop_path=0.2), jnp.zeros((1, 16, 16, 3)))
    np.testing.assert_allclose(rates, [0, 0, 0.1, 0.1, 0.2, 0.2])


OPTIONS = {"registers": 2, "class_token": True, "position": "rope", "layer_scale": 0.5, "mlp": "swiglu"}


def test_rotary_angles_are_of_the_cells_centres():
    angles = layers.rotary_2d(2, 4, 8, 100.0)
    assert angles.shape == (2, 4, 4) and angles.dtype == np.float32
    frequencies = 2 * np.pi * np.array([1, 0.1])  # 100 ** (-i / 2)
    np.testing.assert_allclose(angles[1, 0], [*(0.5 * frequencies), *(-0.75 * frequencies)], rtol=1e-5)
    np.testing.assert_allclose(angles[::-1, ::-1], -angles, rtol=1e-5, atol=1e-6)


def test_rotations_turn_pairs_of_channels_and_keep_their_length():
    x = np.random.default_rng(0).normal(size=(2, 3, 16)).astype(np.float32)
    angles = np.random.default_rng(1).uniform(-3, 3, (3, 4)).astype(np.float32)
    turned = np.asarray(layers.rotate(x, 2, angles)).reshape(2, 3, 2, 2, 4)
    pairs = x.reshape(2, 3, 2, 2, 4)
    numbers = (pairs[..., 0, :] + 1j * pairs[..., 1, :]) * np.exp(1j * angles)[:, None]
    np.testing.assert_allclose(turned, np.stack([numbers.real, numbers.imag], -2), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(layers.rotate(x, 2, np.zeros((3, 4), np.float32)), x)


@pytest.fixture(scope="module")
def rotary():
    """(encoder with all options of DINOv3, its variables, images, jitted apply of (variables, keep or None))."""
    encoder = ViT(**SMALL, depth=2, **OPTIONS)
    images = np.random.default_rng(1).normal(size=(2, 16, 24, 3)).astype(np.float32)
    variables = variables_of(encoder, images)
    return encoder, variables, images, jax.jit(lambda variables, keep: encoder.apply(variables, images, keep=keep))


def test_parameters_of_the_options(rotary):
    encoder, variables, _, _ = rotary
    params = variables["params"]
    assert params["registers"].shape == (1, 2, 16) and "pos_embed" not in params
    block = params["block0"]
    assert {name for name in block} == {"norm1", "attn", "norm2", "w12", "w3", "gamma1", "gamma2"}
    assert block["w12"]["kernel"].shape == (16, 96) and block["w3"]["kernel"].shape == (48, 16)
    start = encoder.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]["block1"]["gamma2"]
    np.testing.assert_array_equal(start, np.full(16, 0.5, np.float32))
    assert encoder.layer_of("registers") == 3 and encoder.layer_of("block1/gamma2") == 1
    assert encoder.image_size is None and encoder.resize(params, 64).params is params


def test_a_subset_of_all_cells_keeps_their_rotary_places(rotary):
    _, variables, _, apply = rotary
    features, _ = apply(variables, None)
    order = np.array([[3, 0, 5, 1, 4, 2], [0, 1, 2, 3, 4, 5]])
    kept, _ = apply(variables, order)
    flat = np.asarray(features).reshape(2, 6, 16)
    np.testing.assert_allclose(kept, np.take_along_axis(flat, order[..., None], 1), rtol=1e-3, atol=1e-4)


def test_the_bias_of_rotated_keys_is_masked(rotary):
    _, variables, _, apply = rotary
    bias = variables["params"]["block0"]["attn"]["qkv"]["bias"]
    features = apply(variables, None)[0]
    for part, same in ((0, False), (1, True), (2, False)):
        changed = jax.tree.map(np.copy, variables)
        changed["params"]["block0"]["attn"]["qkv"]["bias"] = bias + np.repeat(np.eye(3, dtype=np.float32)[part], 16)
        assert np.array_equal(apply(changed, None)[0], features) == same


def test_fc_norm_is_of_the_mean_over_the_cells():
    encoder = ViT(**SMALL, depth=1, class_token=True, fc_norm=True, norm_eps=1e-3)
    images = np.random.default_rng(1).normal(size=(2, 16, 24, 3)).astype(np.float32)
    variables = variables_of(encoder, images)
    features, out = jax.jit(lambda x: encoder.apply(variables, x))(images)
    np.testing.assert_array_equal(features, out["block0"])
    x, p = np.asarray(features).mean((1, 2)), variables["params"]["norm"]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-3)
    np.testing.assert_allclose(out["pooled"], x * p["scale"] + p["bias"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "fields, error, words",
    [
        ({"patch": 16}, ValueError, "images of 16 x 24 pixels .* must be multiples of 16"),
        ({"position": "rotary"}, UserError, "position is 'rotary'; a ViT's is 'sincos', 'learnt', 'rope'"),
        ({"position": "learnt"}, UserError, r"grid is \(\); a learnt position code needs a grid"),
        ({"position": "learnt", "grid": (2, 2)}, UserError, r"grid is \(2, 2\); .* here \(2, 3\)"),
        ({"position": "learnt", "grid": 2}, UserError, r"grid is \(2, 2\); .* here \(2, 3\)"),
        ({"mlp": "relu"}, UserError, "mlp is 'relu'; a ViT's is 'gelu', 'quick_gelu', 'swiglu'"),
        ({"interpolation": "nearest"}, UserError, "interpolation is 'nearest'"),
        ({"registers": -1}, UserError, "registers is -1"),
        ({"layer_scale": -1.0}, UserError, "layer_scale is -1.0"),
        ({"position": "rope", "width": 12}, UserError, "a head has 6 channels; .* multiple of 4"),
        ({"position": "rope", "rope_theta": 0.0}, UserError, "rope_theta is 0.0"),
    ],
)
def test_refusals(fields, error, words):
    with pytest.raises(error, match=words):
        shapes_of(ViT(**{**SMALL, **fields}), jnp.zeros((1, 16, 24, 3)))
