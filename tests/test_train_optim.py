"""Durations in steps, the shape of the learning rate, and what AdamW is applied to, against a hand-written one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qbheat_jax.errors import UserError
from qbheat_jax.train import config_tables, optim


def resolve(**given):
    return config_tables.resolve({"total_steps": 100, "batch_size": 512, "learning_rate": 1e-3} | given)


@pytest.mark.parametrize(
    "given,steps",
    [
        ({}, 0),
        ({"warmup": 7}, 7),
        ({"warmup_epochs": 2}, 5),  # 2 epochs of 1280 images in batches of 512
        ({"warmup_epochs": 0.5}, 1),
        ({"warmup_examples": 5120}, 10),
        ({"warmup_percent": 20}, 20),
        ({"warmup_percent": 0.01}, 1),  # asked for, hence not nothing
        ({"warmup_epochs": 0}, 0),
    ],
)
def test_durations(given, steps):
    found = optim.duration(resolve(**given), "warmup", 100, 1280)
    assert found == steps and isinstance(found, int)


def test_durations_of_every_name():
    config = resolve(checkpoint_every_percent=25, eval_every_epochs=4)
    assert optim.duration(config, "checkpoint_every", 100, 1280) == 25
    assert optim.duration(config, "eval_every", 100, 1280) == 10
    assert optim.duration(config, "log_every", 100, 1280) == 50  # the default


def test_a_duration_set_twice_or_never():
    with pytest.raises(UserError, match="exactly one of warmup, .* must be set, not warmup_epochs, warmup_percent"):
        optim.duration({"warmup_epochs": 1.0, "warmup_percent": 2.0, "batch_size": 4}, "warmup", 100, 8)
    with pytest.raises(UserError, match="must be set, not none"):
        optim.duration({"batch_size": 4}, "warmup", 100, 8)


@pytest.mark.parametrize("epochs,steps", [(1, 2), (2, 5), (4, 10), (0.01, 1)])
def test_total_steps_from_epochs(epochs, steps):
    assert optim.total_steps(resolve(total_steps=None, total_epochs=epochs), 1280) == steps
    assert optim.total_steps(resolve(), 1280) == 100


@pytest.mark.parametrize("batch_size,peak", [(64, 2.5e-4), (256, 1e-3), (1024, 4e-3)])
def test_peak_learning_rate_grows_with_the_batch(batch_size, peak):
    assert optim.peak_learning_rate(resolve(batch_size=batch_size)) == pytest.approx(peak)


def test_schedule_warms_up_and_falls_to_zero():
    rate = optim.schedule(resolve(warmup=10), 100, 1280)
    found = [float(rate(step)) for step in (0, 5, 10, 55, 100)]
    np.testing.assert_allclose(found, [0, 1e-3, 2e-3, 1e-3, 0], atol=1e-9)
    values = np.array([float(rate(step)) for step in range(101)])
    assert (np.diff(values[:11]) > 0).all() and (np.diff(values[10:]) < 0).all()


def test_schedule_without_warmup_starts_at_the_peak():
    rate = optim.schedule(resolve(), 100, 1280)
    np.testing.assert_allclose([float(rate(step)) for step in (0, 50, 100)], [2e-3, 1e-3, 0], atol=1e-9)


def test_schedule_begins_and_ends_where_it_is_told():
    """The floor and the start grow with the batch as the peak does."""
    ends = {"learning_rate_start": 1e-5, "learning_rate_end": 1e-4}
    rate = optim.schedule(resolve(warmup=10, **ends), 100, 1280)
    found = [float(rate(step)) for step in (0, 5, 10, 55, 100)]
    np.testing.assert_allclose(found, [2e-5, 1.01e-3, 2e-3, 1.1e-3, 2e-4], rtol=2e-5)
    rate = optim.schedule(resolve(**ends), 100, 1280)
    np.testing.assert_allclose([float(rate(step)) for step in (0, 50, 100)], [2e-3, 1.1e-3, 2e-4], rtol=2e-5)


def test_a_cosine_from_the_start_takes_over_below_the_peak():
    """HcNet's epochs: 20 of 300, after which the cosine is at 0.989 of the peak."""
    warmup = dict(warmup=20, cosine_from="start", learning_rate_start=2e-4, learning_rate_end=1e-5)
    rate = optim.schedule(resolve(**warmup), 300, 1280)
    whole = optim.schedule(resolve(learning_rate_end=1e-5), 300, 1280)
    np.testing.assert_allclose([float(rate(step)) for step in (0, 10)], [4e-4, 1.2e-3], rtol=2e-5)
    steps = range(20, 301, 40)
    np.testing.assert_allclose([float(rate(s)) for s in steps], [float(whole(s)) for s in steps], rtol=1e-6)
    assert float(rate(20)) / 2e-3 == pytest.approx(0.989, abs=5e-4)


@pytest.mark.parametrize("given", [{"warmup": 100}, {"warmup_percent": 150}, {"warmup_epochs": 50}])
def test_warmup_that_is_longer_than_the_run(given):
    with pytest.raises(UserError, match="warmup is .* steps, but the run has 100: it must be shorter than the run"):
        optim.schedule(resolve(**given), 100, 1280)


PARAMS = {
    "conv": {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(4)},
    "norm": {"scale": jnp.ones(4), "bias": jnp.ones(4)},
    "heat": {"x+": jnp.ones((4, 4)), "y+": jnp.ones((4, 4))},
    "stage": {"frequencies": jnp.ones((2, 2, 4)), "gamma": jnp.ones(4)},
}


def test_decay_is_for_matrices_not_for_biases_and_norms():
    assert optim.decay_mask(PARAMS) == {
        "conv": {"kernel": True, "bias": False},
        "norm": {"scale": False, "bias": False},
        "heat": {"x+": True, "y+": True},
        "stage": {"frequencies": True, "gamma": False},
    }


def run(config, gradients, params=PARAMS, rate=0.1):
    """Parameters after each of the gradients."""
    optimizer = optim.optimizer(config, lambda step: rate)
    state, path = optimizer.init(params), []
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        path.append(params)
    return path


def test_sgd_is_pytorchs():
    config = resolve(optimizer="sgd", momentum=0.5, weight_decay=0.5)
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    first, second = run(config, [ones, ones])
    # By hand: m <- 0.5 m + (g + 0.5 w), w <- w - 0.1 m.
    np.testing.assert_allclose(first["conv"]["kernel"], 1 - 0.1 * 1.5, rtol=1e-6)
    np.testing.assert_allclose(second["conv"]["kernel"], 0.85 - 0.1 * (0.75 + 1 + 0.5 * 0.85), rtol=1e-6)
    np.testing.assert_allclose(second["conv"]["bias"], 0.9 - 0.1 * 1.5, rtol=1e-6)
    (clipped,) = run(resolve(optimizer="sgd", weight_decay=0.0, clip_norm=1.0), [ones])
    norm = np.sqrt(sum(leaf.size for leaf in jax.tree.leaves(PARAMS)))
    np.testing.assert_allclose(clipped["heat"]["x+"], 1 - 0.1 / norm, rtol=1e-6)


def test_decay_shrinks_what_it_applies_to_alone():
    (after,) = run(resolve(weight_decay=0.5), [jax.tree.map(jnp.zeros_like, PARAMS)])
    np.testing.assert_allclose(after["conv"]["kernel"], 1 - 0.1 * 0.5, rtol=1e-6)
    np.testing.assert_array_equal(after["conv"]["bias"], 1)
    np.testing.assert_array_equal(after["norm"]["scale"], 1)


def random_gradients(count):
    leaves, structure = jax.tree.flatten(PARAMS)
    rng = np.random.default_rng(0)
    draw = lambda: [rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]  # noqa: E731
    return [jax.tree.unflatten(structure, draw()) for _ in range(count)]


def test_updates_are_those_of_adamw_written_out():
    gradients = random_gradients(4)
    path = run(resolve(adam_b1=0.8, adam_b2=0.9, weight_decay=0.3), gradients)
    for section, name, decay in (("conv", "kernel", 0.3), ("norm", "scale", 0.0)):
        p, m, v = np.asarray(PARAMS[section][name], np.float64), 0.0, 0.0
        for t, (gradient, found) in enumerate(zip(gradients, path), 1):
            g = gradient[section][name]
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
            p = p - 0.1 * (m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.9**t)) + 1e-8) + decay * p)
            np.testing.assert_allclose(found[section][name], p, rtol=1e-4, atol=1e-5)


def test_epsilon_bounds_the_step_of_a_small_gradient():
    gradients = [jax.tree.map(lambda p: jnp.full_like(p, 1e-3), PARAMS)]
    (after,) = run(resolve(adam_eps=1e-3, weight_decay=0.0), gradients)
    np.testing.assert_allclose(after["conv"]["kernel"], 1 - 0.1 / 2, rtol=1e-5)


def norm(gradient):
    return np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradient)))


@pytest.mark.parametrize("most", [0.5, 1e3])
def test_clipping_is_that_of_optax(most):
    gradients = jax.tree.map(lambda p: jnp.linspace(-1.0, 2.0, p.size).reshape(p.shape), PARAMS)
    ours, optaxs = (clip.update(gradients, clip.init(PARAMS))[0] for clip in (
        optim.clip_by_global_norm(most), optax.clip_by_global_norm(most),
    ))  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, ours, optaxs)


def test_clip_norm_scales_a_huge_gradient_down_to_it():
    """Adam forgets the scale of its first gradient, so a huge one after a small one tells."""
    small, other = random_gradients(2)
    small = jax.tree.map(lambda g: 1.5 * g / norm(small), small)
    huge, unit = (jax.tree.map(lambda g, s=size: s * g / norm(other), other) for size in (1e6, 2.0))
    clipped = run(resolve(clip_norm=2.0), [small, huge])
    by_hand = run(resolve(), [small, unit])
    unclipped = run(resolve(), [small, huge])
    for a, b in zip(jax.tree.leaves(clipped), jax.tree.leaves(by_hand)):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(clipped[-1]), jax.tree.leaves(unclipped[-1]))) > 1e-3


def test_weight_decay_follows_a_cosine():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    optimizer = optim.optimizer(resolve(weight_decay=0.1, weight_decay_end=0.4), lambda step: 0.5, steps=4)
    state = optimizer.init(params)
    for step in range(6):
        updates, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
        decay = 0.4 - 0.3 * (1 + np.cos(np.pi * min(step / 4, 1))) / 2
        np.testing.assert_allclose(updates["kernel"], -0.5 * decay, rtol=1e-5)
        assert not updates["bias"].any()
    constant = optim.optimizer(resolve(weight_decay=0.1), lambda step: 0.5).init(params)  # checkpoints of older runs
    assert jax.tree.structure(constant) == jax.tree.structure(
        optax.adamw(lambda step: 0.5, mask=optim.decay_mask).init(params)
    )
