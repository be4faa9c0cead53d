"""FINOLA: its loss against plain numpy, its figures, what it refuses, and its pictures."""

import jax
import numpy as np
import pytest
import scipy.special

from qbheat_jax import methods, rng
from qbheat_jax.analysis import image_summaries
from qbheat_jax.errors import UserError
from qbheat_jax.models.layers import sincos_2d
from qbheat_jax.ops import images as images_lib
from qbheat_jax.report import tiles
from qbheat_jax.train import config_tables
from tests.conftest import SMALL

FIELDS = {
    **SMALL, "objective": "finola", "finola.width": 16, "finola.paths": 2, "finola.stride": 4, "finola.heads": 2,
    "finola.channels": 32,
}  # fmt: skip


@jax.jit
def evaluated(variables, batch):
    return built().loss(variables["params"], variables["batch_stats"], batch, None, train=False)


def built(**fields):
    return methods.build(config_tables.resolve({**FIELDS, **fields}))


@pytest.fixture(scope="module")
def trial():
    """(method, variables with no zero among them, batch)."""
    method, draw = built(), np.random.default_rng(0)
    batch = {
        "image": draw.integers(0, 256, (3, 32, 32, 3), np.uint8),
        "quarter": np.zeros(3, np.int32),
        "mask": np.array([True, False, True]),
    }
    variables = jax.device_get(jax.jit(method.init)(rng.root(0), batch))
    noise = lambda leaf: (leaf + draw.normal(0, 0.1, leaf.shape)).astype(np.float32)  # noqa: E731
    return method, {**variables, "params": jax.tree.map(noise, variables["params"])}, batch


def gelu(x):
    return 0.5 * x * (1 + scipy.special.erf(x / np.sqrt(2)))


def layer_norm(z, scale=1.0, bias=0.0):
    return (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-6) * scale + bias


def conv(x, params, name):
    """A 3 x 3 convolution of [H, W, C], zero-padded, with its bias."""
    kernel, (height, width, _) = params[name]["kernel"], x.shape
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    sums = (padded[i : i + height, j : j + width] @ kernel[i, j] for i, j in np.ndindex(3, 3))
    return sum(sums) + params[name]["bias"]


def decoded(params, features, paths, heads, size, stride):
    """Pixels [size, size, 3] of the features [h, w, C] of one image, with a loop over heads, paths and cells."""
    pool, side = params["pool"], size // stride
    dense = lambda name, x: x @ pool[name]["kernel"] + pool[name].get("bias", 0.0)  # noqa: E731
    x = dense("embed", features)
    width = x.shape[-1]
    x = layer_norm(x + sincos_2d(*x.shape[:2], width), **pool["norm"]).reshape(-1, width)
    keys, values, part = dense("key", x), dense("value", x), width // heads
    total = np.zeros((side, side, width))
    for query in pool["query"]:
        pooled = np.zeros(width)
        for h in range(heads):
            own = slice(h * part, (h + 1) * part)
            weights = scipy.special.softmax(keys[:, own] @ query[own] / np.sqrt(part))
            pooled[own] = weights @ values[:, own]
        vector = dense("vectors", pooled)
        for i, j in np.ndindex(side, side):
            for order in ((("x", j), ("y", i)), (("y", i), ("x", j))):
                z = vector
                for axis, place in order:
                    steps = place - side // 2
                    for _ in range(abs(steps)):
                        z = z + params["heat"][f"{axis}{'+' if steps > 0 else '-'}"] / (side / 2) @ layer_norm(z)
                total[i, j] += 0.5 * z
    assert len(pool["query"]) == paths
    x = total
    for n in range(int(np.log2(stride))):
        x = gelu(conv(x, params["pixels"], f"up{n}")).repeat(2, 0).repeat(2, 1)
    for n in range(2):
        x = gelu(conv(x, params["pixels"], f"conv{n}"))
    return conv(x, params["pixels"], "pixels")


def test_loss_and_figures_are_those_of_plain_numpy(trial):
    method, variables, batch = trial
    loss, (state, metrics) = evaluated(variables, batch)
    images = np.asarray(method.pixels.normalise(batch["image"]), np.float64)
    encoder = {name: tree["encoder"] for name, tree in variables.items()}
    features = np.asarray(method.encoder.apply(encoder, images.astype(np.float32))[0], np.float64)
    params = jax.tree.map(np.float64, variables["params"]["decoder"])
    made = np.stack([decoded(params, z, 2, 2, 32, 4) for z in features])
    counted = [0, 2]
    np.testing.assert_allclose(loss, np.square(made - images)[counted].mean(), rtol=1e-4)
    mean, std = np.array(images_lib.MEAN), np.array(images_lib.STD)
    shown, true = np.clip(made * std + mean, 0, 1), batch["image"] / 255
    psnr = [10 * np.log10(1 / np.square(shown[i] - true[i]).mean()) for i in counted]
    np.testing.assert_allclose(metrics["psnr"], np.mean(psnr), rtol=1e-4)
    colour = [10 * np.log10(1 / np.square(true[i] - true[i].mean((0, 1))).mean()) for i in counted]
    np.testing.assert_allclose(metrics["psnr_colour"], np.mean(colour), rtol=1e-4)
    flat = np.square(true[counted] - true[counted].mean(0)).mean((1, 2, 3))
    np.testing.assert_allclose(metrics["psnr_mean"], (10 * np.log10(1 / flat)).mean(), rtol=1e-4)
    variance = np.square(images[counted] - images[counted].mean(0)).mean()
    np.testing.assert_allclose(metrics["variance"], variance, rtol=1e-4)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_reconstructions_are_the_decoded_pixels(trial):
    method, variables, batch = trial
    made = np.asarray(jax.jit(method.reconstruct)(variables, batch["image"]))
    assert made.shape == (3, 32, 32, 3) and made.dtype == np.uint8 and made.std() > 1
    _, (_, metrics) = evaluated(variables, batch)
    np.testing.assert_allclose(tiles.psnr(made, batch["image"])[[0, 2]].mean(), metrics["psnr"], atol=0.02)
    assert tiles.psnr(made, made).min() == pytest.approx(100)
    flat = tiles.mean_colour(batch["image"])
    np.testing.assert_allclose(tiles.psnr(flat, batch["image"])[[0, 2]].mean(), metrics["psnr_colour"], atol=0.02)


def test_bfloat16_stays_inside():
    method = built(dtype="bfloat16")
    batch = {"image": np.zeros((1, 32, 32, 3), np.uint8), "mask": np.ones(1, bool)}
    variables = jax.eval_shape(method.init, rng.root(0), batch)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(variables))
    features = jax.ShapeDtypeStruct((1, 4, 4, 16), "bfloat16")
    pixels, out = jax.eval_shape(method.decoder.apply, {"params": variables["params"]["decoder"]}, features)
    assert pixels.dtype == out["map"].dtype == np.float32 and out["map"].shape == (1, 8, 8, 16)
    assert out["vectors"].shape == (1, 2, 16)


@pytest.mark.parametrize("key,value", [
    ("finola.width", 18), ("finola.heads", 3), ("finola.stride", 6), ("finola.stride", 64), ("finola.paths", 0),
])  # fmt: skip
def test_fields_that_do_not_fit_are_refused(key, value):
    named = "finola.width" if key == "finola.heads" else key
    with pytest.raises(UserError, match=named) as caught:
        built(**{key: value})
    assert caught.value.exit_code == 2


def test_at_stride_1_the_decoder_is_three_convolutions():
    method = built(**{"finola.stride": 1})
    batch = {"image": np.zeros((1, 32, 32, 3), np.uint8)}
    layers = jax.eval_shape(method.init, rng.root(0), batch)["params"]["decoder"]["pixels"]
    assert set(layers) == {"conv0", "conv1", "pixels"}


def test_pictures_while_it_trains(trial):
    _, variables, _ = trial
    fields = config_tables.resolve({**FIELDS, "data.eval_split": ""})
    shown = image_summaries.ImageSummaries(fields, methods.build(fields))(variables)
    rows = 6 * 102 - 6
    assert {name: picture.shape for name, picture in shown.items()} == {
        "features": (rows, 3 * 102 - 6, 3), "reconstructions": (rows, 2 * 102 - 6, 3), "spectra": (480, 480, 3)
    }  # fmt: skip
