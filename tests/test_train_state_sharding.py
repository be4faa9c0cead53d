"""The train step: sharded equals unsharded, one compilation a run, float32 state, donated buffers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qbheat_jax import device_mesh, methods, pytree, rng
from qbheat_jax.errors import UserError
from qbheat_jax.train import config_tables, optim, sharding, state

# All kinds of Mobile-Former's blocks; the decoder's are in test_pods.
FIELDS = {"encoder.name": "micro", "decoder.depth": 0, "ema": 0.9, "clip_norm": 1.0}


def batches(config, count):
    generator = np.random.default_rng(0)
    n, size = config.batch_size, config.image_size
    for _ in range(count):
        yield {
            "image": generator.integers(0, 256, (n, size, size, 3), np.uint8),
            "quarter": generator.choice([0, 2, 4, 6, 8], n).astype(np.int32),
            "label": np.zeros(n, np.int32),
            "mask": np.arange(n) > 0,
        }


def run(config, mesh, steps=3):
    """-> (losses, final state, the jitted step)."""
    objective = methods.build(config)
    # A large epsilon: Adam divides a gradient that is rounding alone by its own size, and makes a whole step of it.
    optimizer = optax.adamw(optim.schedule(config, 6, 64), eps=1e-2, weight_decay=0.05, mask=optim.decay_mask)
    key = rng.root(config.seed)
    current, shardings = state.create(
        objective, optimizer, methods.batch_spec(config).shapes(config.batch_size), key, mesh, config.ema
    )
    step = state.train_step(objective, optimizer, key, shardings, mesh, config.ema)
    losses = []
    for batch in batches(config, steps):
        current, metrics = step(current, device_mesh.put_batch(batch, mesh))
        losses.append(float(metrics["loss"]))
    return losses, current, step


@pytest.fixture(scope="module")
def alone():
    from tests.conftest import SMALL

    config = config_tables.resolve({**SMALL, **FIELDS})
    mesh = device_mesh.make_mesh({"data": 1, "fsdp": 1}, jax.devices()[:1])
    return config, run(config, mesh)


def test_sharded_equals_unsharded(alone, monkeypatch):
    """Other meshes, with encoders that compile sooner: test_pods."""
    monkeypatch.setattr(sharding, "SMALLEST_SPLIT", 16)  # so that even this small net is split
    config, (losses, expected, _) = alone
    got, final, _ = run(config, device_mesh.make_mesh({"data": 2, "fsdp": 4}))
    np.testing.assert_allclose(got, losses, rtol=2e-5)
    for (name, a), (_, b) in zip(pytree.names(expected.params), pytree.names(final.params)):
        np.testing.assert_allclose(a, b, atol=1e-6, err_msg=name)
    split = [n for n, p in pytree.names(final) if not p.sharding.is_fully_replicated]
    assert any(n.startswith("params/encoder") for n in split)
    assert any("mu/" in n for n in split) and any(n.startswith("ema/") for n in split)
    whole = sharding.shardings(expected, device_mesh.make_mesh({"data": 8, "fsdp": 1}))
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(whole)), "over data alone nothing is split"


def test_one_compilation_whatever_is_drawn(alone):
    config, (_, _, step) = alone
    assert step._cache_size() == 1


def test_state_stays_float32_and_donated(alone):
    config, (_, final, step) = alone
    assert {p.dtype for p in jax.tree.leaves((final.params, final.ema, final.batch_stats))} == {jnp.dtype("float32")}
    batch = next(batches(config, 1))
    mesh = device_mesh.make_mesh({"data": 1, "fsdp": 1}, jax.devices()[:1])
    kept = jax.tree.map(jnp.copy, final)
    step(kept, device_mesh.put_batch(batch, mesh))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(kept.params))


def test_ema_is_an_average_of_the_parameters(alone):
    config, (_, final, _) = alone
    gap = [float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(final.ema), jax.tree.leaves(final.params))]
    assert max(gap) > 1e-4
    assert pytree.differences(final.params, final.ema) == []
    assert final.variables()["params"] is final.ema


def test_bfloat16_keeps_float32_parameters(alone, small_config):
    config, (exact, _, _) = alone
    half = small_config({**FIELDS, "dtype": "bfloat16"})
    losses, final, _ = run(half, device_mesh.make_mesh({"data": 1, "fsdp": 1}, jax.devices()[:1]), 2)
    assert losses != exact[:2]
    np.testing.assert_allclose(losses, exact[:2], rtol=3e-2)
    assert {p.dtype for p in jax.tree.leaves(final.params)} == {jnp.dtype("float32")}


def test_meshes_that_do_not_fit(alone):
    with pytest.raises(UserError, match=r"mesh.data=3, mesh.fsdp=1, mesh.model=1 does not fit the 8 devices"):
        device_mesh.make_mesh({"data": 3, "fsdp": 1})
    assert dict(device_mesh.make_mesh({"data": -1, "fsdp": 2}).shape) == {"data": 4, "fsdp": 2, "model": 1}
    with pytest.raises(UserError, match=r"batch_size=12 .* multiple of the mesh's 8 devices"):
        sharding.check_batch(12, methods.build(alone[0]), device_mesh.make_mesh({"data": -1, "fsdp": 1}))
