"""MAE and SimMIM: exact shares, the right cells in the right places, losses in closed form, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qbheat_jax import methods
from qbheat_jax.errors import UserError
from qbheat_jax.methods import mae, simmim
from qbheat_jax.methods.common import masks
from qbheat_jax.ops import images as images_lib
from qbheat_jax.train import config_tables
from tests.conftest import SMALL

KEY = jax.random.key(3)
PIXELS = images_lib.Pixels()
BATCH = {
    "image": np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8),
    "mask": np.arange(6) != 2,
}


def configs(fields):
    return config_tables.resolve({**SMALL, "decoder.depth": 0, **fields})


def build(**fields):
    """(objective, variables), these made once for objectives that differ in their loss alone."""
    objective = methods.build(configs(fields))
    return objective, _initialised(tuple((key, value) for key, value in fields.items() if key != "loss_on"))


@functools.cache
def _initialised(fields):
    objective = methods.build(configs(dict(fields)))
    return jax.jit(objective.init)(jax.random.key(0), BATCH)


@pytest.mark.parametrize("cells, ratio, expected", [(196, 0.75, 49), (16, 0.75, 4), (64, 0.6, 26), (10, 0.6, 4)])
def test_mae_keeps_exactly_the_share(cells, ratio, expected):
    assert mae.kept(cells, ratio) == expected


def test_mae_sees_the_cells_it_says():
    """Other pixels in the cells that are not kept change nothing that the encoder says; each kept one does."""
    objective, variables = build(**{"objective": "mae", "encoder.name": "vit_micro"})
    images = PIXELS.normalise(BATCH["image"])
    grid, keep, ranks = objective.draw(KEY, images.shape)
    assert grid == (4, 4) and keep.shape == (6, 4) and keep.dtype == jnp.int32
    seen = np.asarray(ranks) < 4
    assert (seen.sum(1) == 4).all()
    for row, cells in zip(np.asarray(keep), seen):
        assert set(row) == set(np.flatnonzero(cells))
    for n in range(4):  # cell keep[:, n] has rank n
        np.testing.assert_array_equal(np.take_along_axis(np.asarray(ranks), np.asarray(keep[:, n : n + 1]), 1), n)
    assert len({tuple(sorted(row)) for row in np.asarray(keep).tolist()}) > 3  # drawn for each image
    encoder = {"params": variables["params"]["encoder"]}
    apply = jax.jit(lambda images: objective.encoder.apply(encoder, images, keep=keep))
    features, out = apply(images)
    assert features.shape == (6, 4, 16) == out["patches"].shape
    noise = jax.random.normal(KEY, images.shape)
    hidden = jnp.repeat(jnp.repeat(~seen.reshape(6, 4, 4), 8, 1), 8, 2)[..., None]
    same, _ = apply(jnp.where(hidden, noise, images))
    np.testing.assert_array_equal(features, same)
    other, _ = apply(jnp.where(hidden, images, noise))
    assert (np.abs(features - other).max(-1) > 1e-3).all()
    # The kept cells' patches, each with its own position.
    _, whole = jax.jit(lambda images: objective.encoder.apply(encoder, images))(images)
    expected = np.take_along_axis(np.asarray(whole["patches"]).reshape(6, 16, 16), np.asarray(keep)[..., None], 1)
    np.testing.assert_allclose(out["patches"], expected, atol=1e-6)


def test_keeping_all_cells_is_the_whole_encoder():
    objective, variables = build(**{"objective": "mae", "encoder.name": "vit_micro", "encoder.class_token": True})
    encoder = {"params": variables["params"]["encoder"]}
    images = PIXELS.normalise(BATCH["image"])
    keep = jnp.broadcast_to(jnp.arange(16)[::-1], (6, 16))
    features, out = jax.jit(lambda x: objective.encoder.apply(encoder, x, keep=keep))(images)
    expected, whole = jax.jit(lambda x: objective.encoder.apply(encoder, x))(images)
    np.testing.assert_allclose(features[:, ::-1], expected.reshape(6, 16, 16), atol=1e-5)
    np.testing.assert_allclose(out["class_token"], whole["class_token"], atol=1e-5)


def test_mae_decoder_puts_features_where_their_cells_are():
    """A decoder of depth 0: every kept cell is predicted from its own feature, every masked one from the token alone."""
    decoder = mae.MaskDecoder(outputs=5, width=8, depth=0, heads=2)
    kept = jax.random.normal(KEY, (2, 3, 6))
    ranks = masks.ranks(jax.random.key(1), 2, 12)
    variables = decoder.init(KEY, kept, ranks, (3, 4))
    apply = jax.jit(lambda kept: decoder.apply(variables, kept, ranks, (3, 4)).reshape(2, 12, 5))
    before = apply(kept)
    for n in range(3):
        after = apply(kept.at[:, n].add(1.0))
        changed = np.abs(after - before).max(-1) > 1e-5
        np.testing.assert_array_equal(changed, np.asarray(ranks) == n)


@pytest.mark.parametrize("loss_on", ["masked", "all"])
def test_mae_loss_is_that_of_the_target_on_the_cells_asked_for(loss_on):
    fields = {"objective": "mae", "encoder.name": "vit_micro", "norm_pix": True, "loss_on": loss_on, "decoder.depth": 1}
    objective, variables = build(**fields)
    assert objective.target.norm_pix
    loss, (_, metrics) = jax.jit(objective.loss)(variables["params"], {}, BATCH, KEY)

    @jax.jit
    def by_hand(params):
        mask_rng, _ = jax.random.split(KEY)
        images = PIXELS.normalise(BATCH["image"])
        grid, keep, ranks = objective.draw(mask_rng, images.shape)
        features, _ = objective.encoder.apply({"params": params["encoder"]}, images, keep=keep)
        predicted = objective.decoder.apply({"params": params["decoder"]}, features, ranks, grid)
        return objective.target.error(predicted, objective.target(images)).reshape(6, 16), ranks

    error, ranks = by_hand(variables["params"])
    error = np.asarray(error)[BATCH["mask"]]
    cells = (np.asarray(ranks) >= 4)[BATCH["mask"]] if loss_on == "masked" else np.ones((5, 16), bool)
    np.testing.assert_allclose(loss, error[cells].mean(), rtol=1e-5)
    assert metrics["variance"] > 0


@pytest.mark.parametrize("size, ratio, masked", [(8, 0.6, 10), (16, 0.6, 3), (32, 0.6, 1), (8, 0.5, 8), (16, 1.0, 4)])
def test_simmim_masks_exactly_its_share_in_whole_patches(size, ratio, masked):
    fields = {"objective": "simmim", "encoder.name": "pebble", "simmim.mask_size": size, "simmim.mask_ratio": ratio}
    objective = methods.build(configs(fields))
    drawn = np.asarray(objective.masked(KEY, (50, 32, 32, 3)))
    assert drawn.shape == (50, 4, 4)
    times = size // 8
    patches = drawn.reshape(50, 4 // times, times, 4 // times, times)
    assert (patches == patches[:, :, :1, :, :1]).all()
    assert (patches[:, :, 0, :, 0].sum((1, 2)) == masked).all()
    if 0 < masked < (4 // times) ** 2:
        assert drawn.mean(0).min() > 0 and drawn.mean(0).max() < 1  # anywhere, by chance
    np.testing.assert_array_equal(objective.masked(None, (50, 32, 32, 3)), objective.masked(None, (50, 32, 32, 3)))
    assert simmim.count(36, 0.6) == 22 and simmim.count(10, 0.6) == 6


@pytest.mark.parametrize("error", ["l1", "target"])
def test_simmim_loss_in_closed_form(error):
    fields = {"objective": "simmim", "encoder.name": "pebble", "simmim.mask_size": 8, "simmim.error": error}
    objective, variables = build(**{**fields, "norm_pix": True})
    params = {**variables["params"], "mask": {"patch": jax.random.normal(KEY, (8, 8, 3))}}
    loss_of = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))
    (loss, (mutable, metrics)), gradient = loss_of(params, variables["batch_stats"], BATCH, KEY)
    mask_rng, _ = jax.random.split(KEY)
    images = PIXELS.normalise(BATCH["image"])
    masked = np.asarray(objective.masked(mask_rng, images.shape))
    patches = np.asarray(images_lib.to_patches(images, 8))
    shown = np.where(masked[..., None], np.asarray(params["mask"]["patch"]).reshape(-1), patches)
    shown = images_lib.from_patches(jnp.asarray(shown), 8)
    encoder = {"params": params["encoder"], "batch_stats": variables["batch_stats"]["encoder"]}
    (features, _), _ = objective.encoder.apply(encoder, shown, True, mutable=["batch_stats"])
    predicted = np.asarray(features) @ params["predictor"]["kernel"] + params["predictor"]["bias"]
    wanted = np.asarray(objective.target(images)) if error == "target" else patches
    error_of = (
        np.asarray(objective.target.error(predicted, wanted))
        if error == "target"
        else np.abs(predicted - wanted).mean(-1)
    )
    counts = masked & BATCH["mask"][:, None, None]
    np.testing.assert_allclose(loss, error_of[counts].mean(), rtol=1e-4)
    assert ("variance" in metrics) == (error == "target")
    assert np.abs(np.asarray(mutable["encoder"]["bn"]["mean"])).max() > 0
    assert np.abs(gradient["mask"]["patch"]).max() > 0  # the patch that is shown is learnt


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"objective": "mae"}, "encoder.name='pebble' is not accepted with objective='mae'"),
        (
            {"objective": "mae", "encoder.name": "vit_micro", "mae.mask_ratio": 1.0},
            "mae.mask_ratio=1.0 is not accepted",
        ),
        ({"objective": "mae", "encoder.name": "vit_micro", "mae.mask_ratio": 0.01}, "must keep and mask at least one"),
        (
            {"objective": "simmim", "simmim.mask_size": 12},
            "simmim.mask_size=12 .* a multiple of the stride of pebble, 8",
        ),
        ({"objective": "simmim", "simmim.mask_size": 24}, "simmim.mask_size=24 .* that divides image_size=32"),
    ],
)
def test_refusals(fields, words):
    with pytest.raises(UserError, match=words):
        methods.build(configs(fields))


def test_fields_of_other_objectives_are_no_hindrance():
    """An image size of three cells, a decoder width that its heads do not divide: QB-Heat's affair alone."""
    odd = {"image_size": 24, "simmim.mask_size": 8, "decoder.width": 15, "moco.queue": 1}
    assert methods.build(configs({"objective": "simmim", "encoder.name": "pebble", **odd})).mask_size == 8
