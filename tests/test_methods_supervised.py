"""Supervised classification: the loss in closed form, what its variables hold, and that it trains."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qbheat_jax import config as config_lib
from qbheat_jax import device_mesh, methods
from qbheat_jax.methods.common.mixing import Mixing
from qbheat_jax.methods.supervised import Supervised
from qbheat_jax.ops import images
from qbheat_jax.ops.rand_augment import Erasing, RandAugment
from qbheat_jax.train import config_tables, state

CLASSES = 5
PIXELS = images.PIXELS["lite"]


@pytest.fixture(scope="module")
def case():
    fields = {
        "objective": "classifier",
        "encoder.name": "pebble",
        "image_size": 32,
        "head.classes": CLASSES,
        "pixels": "lite",
    }
    objective = methods.build(config_lib.resolve(fields, config_tables.CLASSIFIER))
    generator = np.random.default_rng(0)
    batch = {
        "image": generator.integers(0, 256, (8, 32, 32, 3), np.uint8),
        "label": (np.arange(8) % CLASSES).astype(np.int32),
        "mask": np.arange(8) < 6,
    }
    return objective, batch, jax.jit(objective.init)(jax.random.key(0), batch)


def test_build_gives_what_the_config_says(case):
    objective, _, variables = case
    assert isinstance(objective, Supervised) and objective.pixels == PIXELS
    assert set(variables["params"]) == {"encoder", "head"}
    assert "encoder" in variables["batch_stats"]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_the_mean_cross_entropy_of_the_examples_that_count(case, smoothing):
    objective, batch, variables = case
    objective = Supervised(objective.encoder, objective.head, PIXELS, smoothing)
    logits = np.asarray(objective.logits(variables, PIXELS.normalise(batch["image"])), np.float64)
    logp = (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )
    target = np.eye(CLASSES)[batch["label"]] * (1 - smoothing) + smoothing / CLASSES
    expected = -(target * logp).sum(-1)[:6].mean()
    loss, (mutable, metrics) = objective.loss(variables["params"], variables["batch_stats"], batch, None, train=False)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert metrics["top1"] == pytest.approx((logits.argmax(-1) == batch["label"])[:6].mean())
    assert mutable is variables["batch_stats"]
    # What does not count changes nothing.
    other = {**batch, "label": np.where(batch["mask"], batch["label"], 0).astype(np.int32)}
    assert objective.loss(variables["params"], variables["batch_stats"], other, None, train=False)[0] == loss


def test_it_learns_a_batch_by_heart_and_updates_the_statistics(case):
    objective, batch, variables = case
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, mutable, opt_state, key):
        (loss, (mutable, _)), gradient = jax.value_and_grad(objective.loss, has_aux=True)(params, mutable, batch, key)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(params, updates), mutable, opt_state, loss

    params, mutable = variables["params"], variables["batch_stats"]
    opt_state, losses = optimizer.init(params), []
    for n in range(80):
        params, mutable, opt_state, loss = step(params, mutable, opt_state, jax.random.key(n))
        losses.append(float(loss))
    assert losses[-1] < 0.1 < losses[0]
    assert jax.tree.structure(mutable) == jax.tree.structure(variables["batch_stats"])
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), mutable, variables["batch_stats"])
    assert all(jax.tree.leaves(changed))


def test_without_a_head_there_is_an_encoder_alone(case):
    _, batch, _ = case
    fields = {"objective": "classifier", "encoder.name": "pebble", "image_size": 32}
    objective = methods.build(config_lib.resolve(fields, config_tables.CLASSIFIER))
    shapes = jax.eval_shape(objective.init, jax.random.key(0), jax.tree.map(jnp.asarray, batch))
    assert objective.head is None and set(shapes["params"]) == {"encoder"}


def test_images_are_augmented_in_training_alone(case):
    """By RandAugment, as bytes; by erasing, after normalisation."""
    objective, batch, variables = case
    plain = Supervised(objective.encoder, objective.head, PIXELS)
    augmented = dataclasses.replace(plain, rand_augment=RandAugment(9.0), erasing=Erasing(1.0))
    given = variables["params"], variables["batch_stats"]
    assert augmented.loss(*given, batch, None, False)[0] == plain.loss(*given, batch, None, False)[0]
    made, rest = jax.jit(augmented._augment)(batch["image"], jax.random.key(1))
    first, augment_rng = jax.random.split(jax.random.key(1))
    second, erase_rng = jax.random.split(first)
    images = jax.jit(RandAugment(9.0).__call__)(batch["image"], augment_rng)
    expected = Erasing(1.0)(PIXELS.normalise(images), erase_rng)
    np.testing.assert_allclose(made, expected, atol=1e-6)
    assert (rest == second).all() and (np.asarray(images) != batch["image"]).any()


def test_a_config_says_how_images_are_augmented_and_mixed(small_config):
    fields = {"rand_augment": 9.0, "erasing": 0.25, "mixup": 0.8, "cutmix": 1.0}
    given = {"encoder.name": "pebble", "image_size": 32, "head.classes": 4}
    sections = {f"supervised.{key}": value for key, value in fields.items()}
    pretrained = methods.build(small_config({**given, **sections, "objective": "supervised"}))
    tuned = methods.build(config_lib.resolve({**given, **fields, "total_steps": 1}, config_tables.FINETUNE))
    for method in (pretrained, tuned):
        assert method.mixing == Mixing(0.8, 1.0)
        assert method.rand_augment == RandAugment(9.0) and method.erasing == Erasing(0.25)


def test_the_average_follows_the_parameters_from_the_first_step_on(case):
    """EMA of constant decay, without a warm-up, of every parameter; it is what is evaluated."""
    objective, batch, _ = case
    optimizer, key = optax.sgd(0.1), jax.random.key(0)
    mesh = device_mesh.make_mesh({"data": 1}, jax.devices()[:1])
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
    current, shardings = state.create(objective, optimizer, shapes, key, mesh, 0.75)
    step = state.train_step(objective, optimizer, key, shardings, mesh, 0.75)
    average = jax.device_get(current.params)
    for _ in range(2):
        current, _ = step(current, device_mesh.put_batch(batch, mesh))
        params = jax.device_get(current.params)
        average = jax.tree.map(lambda a, p: 0.75 * a + 0.25 * p, average, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), current.variables()["params"], average)
    moved = jax.tree.map(lambda a, p: np.abs(a - p).max() > 0, average, params)
    assert all(jax.tree.leaves(moved))
