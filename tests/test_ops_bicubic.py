"""Bicubic resampling of tables, as PyTorch's."""

import numpy as np
import pytest

from qbheat_jax.ops import bicubic

TABLE = np.random.default_rng(0).normal(size=(7, 5, 3)).astype(np.float32)


def test_its_own_size_is_the_table_itself():
    assert bicubic.resize(TABLE, (7, 5)) is TABLE


@pytest.mark.parametrize("old, new", [(7, 3), (3, 7), (1, 4), (5, 1), (14, 28)])
def test_a_constant_stays_one(old, new):
    np.testing.assert_allclose(bicubic.weights(old, new).sum(1), 1, atol=1e-6)


def test_weights_halfway_between_two_entries():
    # The kernel at distances 1.5, 0.5, 0.5, 1.5 with a = -0.75; at the border the first entry counts twice.
    near, far = 0.59375, -0.09375
    np.testing.assert_allclose(bicubic.weights(8, 4)[1], [0, far, near, near, far, 0, 0, 0], atol=1e-7)
    np.testing.assert_allclose(bicubic.weights(8, 4)[0], [near + far, near, far, 0, 0, 0, 0, 0], atol=1e-7)


@pytest.mark.parametrize("size", [(14, 10), (3, 2), (7, 9), (1, 1), (1, 8)])
def test_the_same_as_pytorch(size):
    torch = pytest.importorskip("torch")
    maps = torch.from_numpy(TABLE).permute(2, 0, 1)[None]
    known = torch.nn.functional.interpolate(maps, size, mode="bicubic", align_corners=False)[0].permute(1, 2, 0)
    np.testing.assert_allclose(bicubic.resize(TABLE, size), known.numpy(), atol=2e-6)
