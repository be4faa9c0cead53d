"""I-JEPA: masks of fixed sizes, and the loss against plain numpy."""

import jax
import numpy as np
import pytest

from qbheat_jax import methods
from qbheat_jax.methods import ijepa
from qbheat_jax.train import config_tables
from tests.conftest import SMALL


@pytest.mark.parametrize("side", [4, 8, 14])
def test_masks_are_blocks_and_the_context_leaves_them_out(side):
    shapes = ijepa.target_shapes(side, (0.15, 0.2), (0.75, 1.5))
    blocks = ijepa.Blocks(side, 4, shapes, (0.85, 1.0))
    keep, targets = jax.device_get(jax.jit(blocks.draw, static_argnums=1)(jax.random.key(0), 64))
    assert keep.shape == (64, blocks.kept) and targets.shape == (64, 4, blocks.cells)
    found = set()
    for seen, parts in zip(keep, targets):
        for part in parts:
            rows, columns = np.divmod(part, side)
            shape = (np.ptp(rows) + 1, np.ptp(columns) + 1)
            assert len({*part}) == blocks.cells == np.prod(shape) and 0 <= part.min() and part.max() < side**2
            found.add(shape)
        if side > 4:  # of 16 cells the blocks may leave none
            assert not {*seen} & {*parts.flat}
    assert found == {*shapes}
    assert len({tuple(sorted(one.flat)) for one in targets}) > 20
    if side == 14:
        assert blocks.cells == 30 and blocks.kept == 93
        assert np.mean([len({*seen}) for seen in keep]) > 85  # few images repeat many cells


def test_loss_against_numpy():
    config = config_tables.resolve(
        {**SMALL, "objective": "ijepa", "encoder.name": "vit_micro", "ijepa.targets": 2, "batch_size": 4}
    )
    method = methods.build(config, methods.Schedule(10, 4.0))
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    batch = {"image": images, "mask": np.arange(4) != 1}
    variables = jax.jit(method.init)(jax.random.key(0), batch)
    params, state = variables["params"], variables["batch_stats"]
    moved = jax.tree.map(lambda p: p + 0.1, params)
    value, (after, metrics) = jax.jit(method.loss)(moved, state, batch, jax.random.key(5))
    teacher = jax.tree.map(lambda t, p: 0.996 * t + 0.004 * p, state["teacher_encoder"]["params"], moved["encoder"])
    for a, b in zip(*map(jax.tree.leaves, (teacher, after["teacher_encoder"]["params"]))):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert int(after["steps"]) == 1 and {*metrics} == {"feature_std", "participation_ratio"}

    @jax.jit
    def parts(params, teacher):
        keep, blocks = method.blocks.draw(jax.random.split(jax.random.key(5))[0], 4)
        pixels = method.pixels.normalise(images)
        seen, _ = method.encoder.apply({"params": params["encoder"]}, pixels, keep=keep)
        predicted = method.predictor.apply({"params": params["predictor"]}, seen, keep, blocks, (4, 4))
        return blocks, predicted, method.encoder.apply({"params": teacher}, pixels)[0]

    blocks, predicted, features = jax.device_get(parts(moved, teacher))
    features = features.reshape(4, 16, -1)
    features = (features - features.mean(-1, keepdims=True)) / np.sqrt(features.var(-1, keepdims=True) + 1e-6)
    losses = []
    for n in (0, 2, 3):
        error = np.abs(predicted[n] - features[n][blocks[n]])
        losses.append(np.where(error < 1, error**2 / 2, error - 0.5).mean())
    np.testing.assert_allclose(value, np.mean(losses), rtol=1e-4)
