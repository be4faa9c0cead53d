"""MoCo-v2: queue, momentum update and loss against plain numpy; keys that know nothing of their batch; its colours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qbheat_jax import methods
from qbheat_jax.errors import UserError
from qbheat_jax.methods import moco
from qbheat_jax.ops import colour
from qbheat_jax.train import config_tables

FIELDS = {
    "objective": "moco", "encoder.name": "pebble", "moco.queue": 32, "moco.momentum": 0.9, "moco.width": 12,
    "moco.blur_share": 0.0,  # blur takes long to compile, and is seen to below
}  # fmt: skip
BATCH = 8


def batch_of(seed=0):
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (2, BATCH, 32, 32, 3), np.uint8)
    return {"image": images[0], "image2": images[1], "mask": np.arange(BATCH) != 3}


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "standardise"])
def case(request):
    from tests.conftest import SMALL

    objective = methods.build(
        config_tables.resolve({**SMALL, "batch_size": BATCH, **FIELDS, "moco.standardise": request.param})
    )
    variables = jax.jit(objective.init)(jax.random.key(0), batch_of())
    return objective, variables, jax.jit(objective.loss, static_argnames="train")


def normalised(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_loss_against_numpy():
    generator = np.random.default_rng(0)
    query, key, queue = (normalised(generator.normal(size=(n, 6))) for n in (5, 5, 16))
    losses, nearest = moco.info_nce(*(jnp.asarray(x, jnp.float32) for x in (query, key, queue)), 0.2)
    for n in range(5):
        logits = np.array([query[n] @ key[n], *(query[n] @ other for other in queue)]) / 0.2
        np.testing.assert_allclose(losses[n], -np.log(np.exp(logits[0]) / np.exp(logits).sum()), rtol=1e-5)
        assert bool(nearest[n]) == (logits.argmax() == 0)


def test_queue_against_a_list():
    """First in, first out, in whole batches, around the end; an image that does not count leaves the old key."""
    queue, pointer = jnp.zeros((12, 2)), jnp.zeros((), jnp.int32)
    kept, place = [np.zeros(2)] * 12, 0
    enqueue = jax.jit(moco.enqueue)
    for step in range(5):
        key = np.random.default_rng(step).normal(size=(4, 2)).astype(np.float32)
        mask = np.arange(4) != step
        queue, pointer = enqueue(queue, pointer, key, mask)
        for row, counts in zip(key, mask):
            kept[place] = row if counts else kept[place]
            place = (place + 1) % 12
        np.testing.assert_array_equal(queue, kept)
        assert int(pointer) == place


def test_steps_against_numpy(case):
    """Three steps of changing parameters: what follows follows, and what is enqueued are the followers' keys."""
    objective, variables, loss = case
    params, mutable = variables["params"], variables["batch_stats"]
    slow = jax.tree.map(np.asarray, {part: params[part] for part in ("encoder", "projector")})
    stats = {part: jax.tree.map(np.asarray, mutable[part]) for part in slow if part in mutable}
    assert ("projector" in stats) == objective.projector.standardise
    for a, b in zip(jax.tree.leaves(slow["encoder"]), jax.tree.leaves(mutable["key_encoder"]["params"])):
        np.testing.assert_array_equal(a, b)  # it starts as a copy
    queue = np.asarray(mutable["queue"])
    np.testing.assert_allclose(np.linalg.norm(queue, axis=-1), 1, atol=1e-5)
    for step in range(3):
        params = jax.tree.map(lambda p: p + 0.1 * (step + 1), params)
        batch, before = batch_of(step), mutable
        value, (mutable, _) = loss(params, before, batch, jax.random.key(step))
        early = np.float32(min(0.9, (1 + step) / (10 + step)))
        slow = jax.tree.map(lambda s, p: early * s + (1 - early) * np.asarray(p), slow, params)
        # The statistics follow those that the encoder had before this batch.
        stats = {
            part: jax.tree.map(lambda s, p: early * s + (1 - early) * np.asarray(p), tree, before[part])
            for part, tree in stats.items()
        }
        for part in ("encoder", "projector"):
            got = mutable[f"key_{part}"]["params"]
            jax.tree.map(lambda s, g: np.testing.assert_allclose(g, s, rtol=1e-4, atol=1e-5), slow[part], got)
        for part, tree in stats.items():
            got = mutable[f"key_{part}"]["batch_stats"]
            jax.tree.map(lambda s, g: np.testing.assert_allclose(g, s, rtol=1e-4, atol=1e-5), tree, got)
        place = step * BATCH
        fresh = np.asarray(mutable["queue"])[place : place + BATCH]
        np.testing.assert_array_equal(fresh[3], queue[place + 3])
        assert (np.abs(np.delete(fresh, 3, 0) - np.delete(queue[place : place + BATCH], 3, 0)).max(1) > 1e-3).all()
        assert int(mutable["pointer"]) == place + BATCH and int(mutable["steps"]) == step + 1
        assert np.isfinite(value)


def test_a_key_is_a_function_of_its_own_image(case):
    """The answer to batch norm's leak: other images in the batch change the query's features, and no key."""
    objective, variables, loss = case
    batch, rng = batch_of(), jax.random.key(5)
    other = {**batch, "image": batch["image"].copy(), "image2": batch["image2"].copy()}
    other["image"][1:], other["image2"][1:] = 255 - other["image"][1:] // 3, other["image2"][1:] // 4
    stats = [loss(variables["params"], variables["batch_stats"], b, rng)[1][0] for b in (batch, other)]
    keys = [np.asarray(s["queue"][:BATCH]) for s in stats]
    np.testing.assert_array_equal(keys[0][0], keys[1][0])
    assert np.abs(keys[0][1] - keys[1][1]).max() > 1e-3
    assert np.abs(stats[0]["encoder"]["bn"]["mean"] - stats[1]["encoder"]["bn"]["mean"]).max() > 1e-4
    np.testing.assert_array_equal(*(s["key_encoder"]["batch_stats"]["bn"]["mean"] for s in stats))


def test_standardised_keys_of_different_images_differ_from_the_first_step_on():
    """Where features are nearly the same for all images: without it their keys are too, and are told apart by age alone."""
    features = 5.0 + 0.01 * jax.random.normal(jax.random.key(0), (64, 16))
    for standardise in (False, True):
        projector = moco.Projector(12, standardise)
        variables = projector.init(jax.random.key(1), features)
        keys, _ = projector.apply(variables, features, True, mutable=["batch_stats"])
        assert (np.linalg.norm(keys.mean(0)) > 0.99) == (not standardise)
    assert np.linalg.norm(keys.mean(0)) < 0.8


def test_no_gradient_flows_through_the_key(case):
    objective, variables, _ = case
    mutable = variables["batch_stats"]

    def value(slow):
        return objective.loss(variables["params"], {**mutable, "key_encoder": slow}, batch_of(), jax.random.key(0))[0]

    gradient = jax.jit(jax.grad(value))(mutable["key_encoder"])
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradient))


def test_evaluation_changes_nothing_and_is_the_same_every_time(case):
    objective, variables, loss = case
    batch = {name: value for name, value in batch_of().items() if name != "image2"}
    values = []
    for _ in range(2):
        value, (mutable, metrics) = loss(variables["params"], variables["batch_stats"], batch, None, train=False)
        jax.tree.map(np.testing.assert_array_equal, mutable, variables["batch_stats"])
        values.append(float(value))
    assert values[0] == values[1] and 0 <= metrics["top1"] <= 1
    hidden = {**batch, "image": np.where(batch["mask"][:, None, None, None], batch["image"], 0)}
    assert float(loss(variables["params"], variables["batch_stats"], hidden, None, train=False)[0]) == values[0]


def test_colours_have_the_papers_shares():
    images = jnp.broadcast_to(jnp.asarray([0.7, 0.5, 0.2]), (4000, 1, 1, 3))
    made = np.asarray(jax.jit(moco.Colours(blur_prob=0.0))(images, jax.random.key(0)))[:, 0, 0]
    grey, same = np.ptp(made, axis=-1) < 1e-6, (np.abs(made - [0.7, 0.5, 0.2]) < 1e-5).all(-1)
    assert abs(grey.mean() - 0.2) < 0.02 and abs(same.mean() - 0.2 * 0.8) < 0.02
    edges = jnp.zeros((400, 8, 8, 3)).at[:, :, 4:].set(1.0)
    blurred = jax.jit(moco.Colours(colour.Jitter(), 0.0, 0.0, 0.5))(edges, jax.random.key(1))
    assert abs((np.abs(blurred - edges).max((1, 2, 3)) > 1e-3).mean() - 0.5) < 0.1


def test_weights_to_start_from_are_the_key_encoders_too(case):
    objective, variables, _ = case
    given = jax.tree.map(lambda x: np.asarray(x) + 1, {"encoder": variables["params"]["encoder"]})
    stats = {"encoder": jax.tree.map(np.asarray, variables["batch_stats"]["encoder"])}
    started = objective.init_copies({"params": given, "batch_stats": stats})
    assert set(started["batch_stats"]) == {"encoder", "key_encoder"}
    jax.tree.map(np.testing.assert_array_equal, started["batch_stats"]["key_encoder"]["params"], given["encoder"])


def test_a_queue_of_no_whole_batches_is_refused(small_config):
    with pytest.raises(UserError, match="moco.queue=40 is not accepted: it takes a multiple of batch_size=16"):
        methods.build(small_config({**FIELDS, "moco.queue": 40}))
