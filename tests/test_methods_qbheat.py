"""The QB-Heat objective: what the encoder sees, what the loss counts, and what a reconstruction may look at."""

import functools
import typing

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qbheat_jax import pytree
from qbheat_jax.methods.common.targets import Target
from qbheat_jax.methods.qbheat import QBHeat, crop_visible
from qbheat_jax.models.decoder import HeatDecoder
from qbheat_jax.models.encoder import Encoder
from qbheat_jax.ops import images as images_lib
from qbheat_jax.ops import poisson, quarters

HEIGHT, WIDTH, STRIDE = 16, 32, 4
ALL = np.arange(9, dtype=np.int32)
KEY = jax.random.key(0)


class Tiny(Encoder):
    """One strided convolution and a batch norm: the least that is an encoder."""

    stride: int = STRIDE
    width: int = 8

    @nn.compact
    def __call__(self, images, train=False):
        assert images.shape[1:] == (HEIGHT // 2, WIDTH // 2, 3), "the encoder sees the visible crop alone"
        x = nn.Conv(self.width, (self.stride, self.stride), (self.stride, self.stride), name="stem")(images)
        return nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x), {}


class Blind(Encoder):
    """Gives the same features whatever it sees, so that pixels reach the loss as targets only. No batch statistics."""

    stride: int = STRIDE
    width: int = 8

    @nn.compact
    def __call__(self, images, train=False):
        assert images.shape[1:] == (HEIGHT // 2, WIDTH // 2, 3), "the encoder sees the visible crop alone"
        batch, height, width, _ = images.shape
        feature = self.param("feature", nn.initializers.normal(1.0), (self.width,))
        return jnp.broadcast_to(feature, (batch, height // self.stride, width // self.stride, self.width)), {}


@functools.cache
def compiled_loss(objective, train):
    return jax.jit(lambda params, mutable, batch: objective.loss(params, mutable, batch, KEY, train))


def first_batch():
    return {"image": random_images(), "quarter": ALL, "mask": np.ones(9, bool)}


class Case(typing.NamedTuple):
    objective: QBHeat
    variables: dict
    batch: dict

    def loss(self, batch=None, train=False):
        """-> (loss, metrics, batch statistics)."""
        batch = self.batch if batch is None else batch
        evaluate = compiled_loss(self.objective, train)
        loss, (mutable, metrics) = evaluate(self.variables["params"], self.variables["batch_stats"], batch)
        assert loss.shape == () and loss.dtype == jnp.float32
        return float(loss), metrics, mutable


def random_images(batch=9, seed=0, height=HEIGHT, width=WIDTH):
    return np.random.default_rng(seed).integers(0, 256, (batch, height, width, 3), dtype=np.uint8)


def make(encoder=Blind(), depth=0, loss_on="masked", **asked):
    """A case with random parameters around 0 or, for scales and variances, 1: no zero hides anything."""
    target = Target(STRIDE, **asked)
    decoder = HeatDecoder(sum(target.widths.values()), width=8, depth=depth, heads=2)
    objective = QBHeat(encoder, decoder, target, loss_on)
    rng = np.random.default_rng(1)

    def draw(name, leaf):
        return rng.normal(float(name.endswith(("scale", "var"))), 0.2, leaf.shape).astype(np.float32)

    variables = pytree.map_with_names(draw, jax.eval_shape(objective.init, KEY, first_batch()))
    return Case(objective, variables, first_batch())


def predicting(case, patch):
    """The same case with a decoder that gives `patch` for every cell."""
    layers = dict(case.variables["params"]["decoder"])
    layers["pixels"] = {"kernel": jnp.zeros_like(layers["pixels"]["kernel"]), "bias": jnp.asarray(patch, jnp.float32)}
    params = case.variables["params"] | {"decoder": layers}
    return case._replace(variables=case.variables | {"params": params})


def hidden_pixels():
    """bool[9, H, W], from the pixel geometry rather than that of the cells."""
    hidden = np.ones((9, HEIGHT, WIDTH), bool)
    for q in ALL:
        hidden[q][quarters.visible_slices(HEIGHT, WIDTH, int(q))] = False
    return hidden


def with_pixels(batch, where):
    """The batch with other pixels at `where`, bool[9, H, W]."""
    return batch | {"image": np.where(where[..., None], random_images(seed=7), batch["image"])}


# --- What is seen ---------------------------------------------------------------------------------------------------


def test_crop_visible_is_the_slices_for_all_nine():
    images = random_images()
    crops = jax.jit(crop_visible)(images, ALL)
    assert crops.dtype == jnp.uint8
    for q in ALL:
        np.testing.assert_array_equal(crops[q], images[q][quarters.visible_slices(HEIGHT, WIDTH, int(q))])


def test_init_gives_named_parameters_and_statistics():
    names = {name for name, _ in pytree.names(make(Tiny()).variables)}
    assert {"params/encoder/stem/kernel", "params/decoder/heat/x+", "params/decoder/pixels/kernel"} <= names
    assert {"batch_stats/encoder/norm/mean", "batch_stats/encoder/norm/var"} <= names
    assert {name.split("/")[0] for name in names} == {"params", "batch_stats"}
    assert make(Blind()).variables["batch_stats"] == {}


# --- What is counted ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_on", ["masked", "all"])
@pytest.mark.parametrize("norm_pix", [False, True])
def test_loss_is_the_mean_squared_error_over_the_cells_asked_for(loss_on, norm_pix):
    """Against numpy, pixel by pixel, for a decoder that predicts one patch everywhere."""
    patch = np.random.default_rng(3).normal(size=STRIDE * STRIDE * 3)
    case = predicting(make(loss_on=loss_on, norm_pix=norm_pix), patch)
    target = (case.batch["image"] / 255.0 - images_lib.MEAN) / images_lib.STD
    errors = []
    for q, i, j in np.ndindex(9, HEIGHT // STRIDE, WIDTH // STRIDE):
        rows, columns = slice(i * STRIDE, (i + 1) * STRIDE), slice(j * STRIDE, (j + 1) * STRIDE)
        if loss_on == "masked" and not hidden_pixels()[q, rows, columns].any():
            continue
        wanted = target[q, rows, columns].reshape(-1)
        if norm_pix:
            wanted = (wanted - wanted.mean()) / np.sqrt(wanted.var(ddof=1) + 1e-6)
        errors.append(((patch - wanted) ** 2).mean())
    assert len(errors) == 9 * 32 * (0.75 if loss_on == "masked" else 1)
    assert case.loss()[0] == pytest.approx(np.mean(errors), rel=1e-4)


@pytest.mark.parametrize("norm_pix", [False, True])
def test_loss_on_masked_ignores_visible_pixels_as_targets(norm_pix):
    """With an encoder that is blind to them, visible pixels can only reach the loss as targets."""
    case, everywhere = make(norm_pix=norm_pix), make(norm_pix=norm_pix, loss_on="all")
    visible, hidden = with_pixels(case.batch, ~hidden_pixels()), with_pixels(case.batch, hidden_pixels())
    assert case.loss(visible) == case.loss()
    assert everywhere.loss(visible)[0] != everywhere.loss()[0]
    assert case.loss(hidden)[0] != case.loss()[0] and everywhere.loss(hidden)[0] != everywhere.loss()[0]


@pytest.mark.parametrize("norm_pix", [False, True])
def test_norm_pix_forgets_a_patchs_brightness_and_contrast(norm_pix):
    """Only where targets are normalised: the images brightened cell by cell leave the loss of a fixed guess alone."""
    guess = np.random.default_rng(3).normal(size=STRIDE * STRIDE * 3)
    case = predicting(make(norm_pix=norm_pix), guess)
    plain = case.batch | {"image": case.batch["image"] // 4}
    shift = np.random.default_rng(4).integers(0, 60, (9, HEIGHT // STRIDE, WIDTH // STRIDE, 1), dtype=np.uint8)
    shift = shift.repeat(STRIDE, 1).repeat(STRIDE, 2)
    # One channel's deviation in all of them, else a grey level is a different step in each channel.
    grey = {key: value[..., :1].repeat(3, -1) if key == "image" else value for key, value in plain.items()}
    change = abs(case.loss(grey | {"image": grey["image"] + shift})[0] - case.loss(grey)[0])
    assert change < 0.02 if norm_pix else change > 0.02


def test_examples_that_are_masked_out_do_not_count():
    case = make(Tiny())
    six = np.arange(9) < 6
    loss, metrics, _ = case.loss(case.batch | {"mask": six})
    others = case.batch | {"mask": six, "image": np.where(six[:, None, None, None], case.batch["image"], 255)}
    assert case.loss(others)[:2] == (loss, metrics)
    three = case.loss(case.batch | {"mask": ~six})[0]
    assert loss != three and (6 * loss + 3 * three) / 9 == pytest.approx(case.loss()[0], rel=1e-5)


def test_a_batch_without_examples_has_loss_zero():
    case = make()
    loss, metrics, _ = case.loss(case.batch | {"mask": np.zeros(9, bool)})
    assert loss == 0 == float(metrics["variance"])


@pytest.mark.parametrize("loss_on", ["masked", "all"])
def test_variance_is_the_loss_of_the_best_constant_prediction(loss_on):
    """Images of one colour a cell, so that the mean colour is the mean patch."""
    case = make(loss_on=loss_on)
    flat = case.batch["image"][:, ::STRIDE, ::STRIDE].repeat(STRIDE, 1).repeat(STRIDE, 2)
    batch = case.batch | {"image": flat}
    pixels = np.asarray(images_lib.Pixels().normalise(flat))
    mean = pixels[hidden_pixels() if loss_on == "masked" else np.ones_like(hidden_pixels())].mean(0)
    constant = predicting(case, np.tile(mean, STRIDE * STRIDE))
    loss, metrics, _ = constant.loss(batch)
    assert float(metrics["variance"]) == pytest.approx(loss, rel=1e-4)
    assert predicting(case, np.tile(mean + 0.1, STRIDE * STRIDE)).loss(batch)[0] == pytest.approx(loss + 0.01, rel=1e-3)
    assert float(case.loss(batch)[1]["variance"]) == float(metrics["variance"])  # of the images, not of the network


# --- Training -------------------------------------------------------------------------------------------------------


def test_training_updates_batch_statistics_and_evaluation_does_not():
    case = make(Tiny())
    before = case.variables["batch_stats"]
    _, _, same = case.loss(train=False)
    _, _, after = case.loss(train=True)
    assert jax.tree.structure(before) == jax.tree.structure(same) == jax.tree.structure(after)
    assert all(map(np.array_equal, jax.tree.leaves(before), jax.tree.leaves(same)))
    assert not any(map(np.allclose, jax.tree.leaves(before), jax.tree.leaves(after)))


def test_an_encoder_without_statistics_trains():
    assert make(Blind()).loss(train=True)[2] == {}


def test_every_parameter_learns_and_the_loss_goes_down():
    case = make(Tiny(), depth=1)
    variables = jax.jit(case.objective.init)(KEY, case.batch)
    optimizer = optax.adam(2e-2)
    gradient_of = jax.value_and_grad(case.objective.loss, has_aux=True)

    @jax.jit
    def step(params, mutable, state):
        (loss, (mutable, metrics)), gradient = gradient_of(params, mutable, case.batch | {"image": images}, KEY)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), mutable, state, loss, metrics["variance"], gradient

    # Images of one colour: what is hidden can be told from what is seen.
    colours = np.random.default_rng(5).integers(0, 256, (9, 1, 1, 3), dtype=np.uint8)
    images = np.broadcast_to(colours, (9, HEIGHT, WIDTH, 3))
    params, mutable = variables["params"], variables["batch_stats"]
    state, losses, moved = optimizer.init(params), [], {}
    for _ in range(30):
        params, mutable, state, loss, variance, gradient = step(params, mutable, state)
        losses.append(float(loss))
        moved |= {name: True for name, g in pytree.names(gradient) if np.abs(g).max() > 1e-7}
    assert losses[-1] < 0.5 * losses[0] and losses[-1] < 0.5 * float(variance)
    # Of all parameters, the convolution's bias alone may rest: the batch norm that follows takes it out again.
    assert {name for name, _ in pytree.names(params)} - set(moved) <= {"encoder/stem/bias"}


# --- Reconstruction -------------------------------------------------------------------------------------------------


@functools.cache
def compiled_reconstruct(objective):
    return jax.jit(objective.reconstruct)


def reconstruct(case, images=None, blend=False):
    images = case.batch["image"] if images is None else images
    return np.asarray(compiled_reconstruct(case.objective)(case.variables, images, ALL, blend))


@pytest.mark.parametrize("norm_pix, statistics", [(False, 0), (True, 0), (True, 1)])
@pytest.mark.parametrize("blend", [False, True])
def test_reconstruction_keeps_what_is_visible_and_reads_nothing_hidden(norm_pix, statistics, blend):
    case = make(Tiny(), norm_pix=norm_pix, statistics=statistics)
    images, hidden = case.batch["image"], hidden_pixels()
    found = reconstruct(case, blend=blend)
    assert found.dtype == np.uint8 and found.shape == images.shape
    np.testing.assert_array_equal(found[~hidden], images[~hidden])
    assert (found[hidden] != images[hidden]).mean() > 0.5
    other = with_pixels(case.batch, hidden)["image"]
    np.testing.assert_array_equal(reconstruct(case, other, blend), found)
    seen = with_pixels(case.batch, ~hidden)["image"]
    assert (reconstruct(case, seen, blend)[hidden] != found[hidden]).mean() > 0.5


def test_reconstruction_puts_patches_in_their_place():
    """A decoder that gives one patch, each pixel of which can be told from the others."""
    patch = np.linspace(-1, 1, STRIDE * STRIDE * 3)
    found = reconstruct(predicting(make(Tiny()), patch))
    expected = np.asarray(images_lib.Pixels().unnormalise(patch.reshape(STRIDE, STRIDE, 3)))
    expected = np.tile(expected, (HEIGHT // STRIDE, WIDTH // STRIDE, 1))
    for q in ALL:
        hidden = hidden_pixels()[q]
        np.testing.assert_array_equal(found[q][hidden], expected[hidden])


def test_of_one_colour_everywhere_blending_leaves_the_heat_equation_on_pixels():
    case = make(Tiny())
    pixels = images_lib.Pixels().normalise(case.batch["image"])
    settled = images_lib.Pixels().unnormalise(jax.jit(poisson.solve)(pixels, jnp.asarray(~hidden_pixels())))
    found = reconstruct(predicting(case, np.tile([0.3, -0.2, 1.0], STRIDE * STRIDE)), blend=True)
    assert np.abs(found.astype(int) - np.asarray(settled).astype(int)).max() <= 1


def laid_out(pixels, q, patch):
    """One normalised image float64 [H, W, 3] with `patch` in its hidden cells, mean colours running on between cells."""
    image = np.where(hidden_pixels()[q][..., None], np.tile(patch, (HEIGHT // STRIDE, WIDTH // STRIDE, 1)), pixels)
    means = image.reshape(HEIGHT // STRIDE, STRIDE, WIDTH // STRIDE, STRIDE, 3).mean((1, 3))
    surface = means
    for axis, length in enumerate((HEIGHT, WIDTH)):
        centres = (np.arange(length // STRIDE) + 0.5) * STRIDE - 0.5
        along = functools.partial(np.interp, np.arange(length), centres)
        surface = np.apply_along_axis(along, axis, surface)
    return image - means.repeat(STRIDE, 0).repeat(STRIDE, 1) + surface


def check_laid_out(found, pixels, patch_of):
    """Of all nine placements: what was reconstructed is `patch_of(q)` laid out, to a grey level."""
    for q in ALL:
        hidden = hidden_pixels()[q]
        expected = np.asarray(images_lib.Pixels().unnormalise(laid_out(pixels[q], q, patch_of(q))))
        assert np.abs(found[q][hidden].astype(int) - expected[hidden].astype(int)).max() <= 1


def test_norm_pix_is_undone_with_the_visible_block():
    """Predicting 0, a patch's mean, gives the mean of what is visible; predicting 1, one deviation of it more."""
    case = make(Tiny(), norm_pix=True)
    pixels = np.asarray(images_lib.Pixels().normalise(case.batch["image"]), np.float64)

    def patch_of(q):
        visible = pixels[q][~hidden_pixels()[q]]
        return np.full((STRIDE, STRIDE, 3), visible.mean() + guess * visible.std(ddof=1))

    for guess in (0.0, 1.0):
        check_laid_out(reconstruct(predicting(case, np.full(STRIDE * STRIDE * 3, guess))), pixels, patch_of)


def test_statistics_are_those_of_each_patch():
    """By a plain loop over patches: what is predicted, and what the loss is."""
    case = make(statistics=1.0, norm_pix=True, loss_on="all")
    images = np.asarray(images_lib.Pixels().normalise(case.batch["image"]), np.float64)
    guess = np.concatenate([np.zeros(STRIDE * STRIDE * 3), [0.2], [0.7]])
    total = []
    for image in images:
        for row in range(0, HEIGHT, STRIDE):
            for column in range(0, WIDTH, STRIDE):
                patch = image[row : row + STRIDE, column : column + STRIDE].reshape(-1)
                mean, std = patch.mean(), np.sqrt(patch.var(ddof=1) + 1e-6)
                statistics = np.array([mean - 0.2, std - 0.7])
                total.append(np.mean(((patch - mean) / std) ** 2) + np.mean(statistics**2))
    assert predicting(case, guess).loss()[0] == pytest.approx(np.mean(total), rel=1e-4)
    target = np.asarray(case.objective.target(jnp.asarray(images, jnp.float32)))[-1, -1, -1]
    np.testing.assert_allclose(target, np.concatenate([(patch - mean) / std, [mean], [std]]), atol=1e-4)


def test_reconstructions_take_the_statistics_that_were_predicted():
    guess = np.linspace(-1, 1, STRIDE * STRIDE * 3)
    case = make(Tiny(), statistics=1.0, norm_pix=True)
    pixels = np.asarray(images_lib.Pixels().normalise(case.batch["image"]), np.float64)
    for deviation, counted in ((0.4, 0.4), (-1.0, 0.0)):  # a negative deviation counts as none
        found = reconstruct(predicting(case, np.concatenate([guess, [0.3], [deviation]])))
        check_laid_out(found, pixels, lambda q: guess.reshape(STRIDE, STRIDE, 3) * counted + 0.3)
