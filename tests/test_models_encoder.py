"""A toy encoder, defined here and registered by one line, goes through every command that takes an encoder."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qbheat_jax import api, data
from qbheat_jax.errors import BAD_INPUT, UserError
from qbheat_jax.models import registry
from qbheat_jax.models.encoder import Encoder
from qbheat_jax.tasks import finetune, pretrain
from qbheat_jax.train import config_tables
from tests.probe_data import Blobs


class Toy(Encoder):
    """One strided convolution with a bias, and no batch norm."""

    drop_path: float = 0.0
    dtype: Any = jnp.float32
    stride, width = 8, 12
    has_batch_norm = False

    @nn.compact
    def __call__(self, images, train=False):
        return nn.gelu(nn.Conv(self.width, (8, 8), (8, 8), dtype=self.dtype, name="cells")(images)), {}


@pytest.fixture(autouse=True)
def toy(monkeypatch, one_device):
    monkeypatch.setitem(registry.ENCODERS, "toy", registry.Entry(Toy, {}, {8: {}}))
    monkeypatch.setattr(data, "open_source", lambda *a, **k: Blobs())


def tuning(**fields):
    given = {
        "init": "random",
        "data.source": "blobs",
        "image_size": 32,
        "encoder.name": "toy",
        "batch_size": 16,
        "total_steps": 2,
    }
    return config_tables.resolve({"objective": "finetune", **given, **fields})


def test_it_pretrains_and_loads(small_config, tmp_path):
    pretrain.run(
        small_config({"encoder.name": "toy", "data.source": "blobs", "quarter.placements": "corners"}), tmp_path
    )
    model = api.load(tmp_path)
    assert model.features(np.zeros((1, 64, 32, 3), np.uint8)).shape == (1, 8, 4, 12)
    assert model.sized(64).config.image_size == 64


def test_it_fine_tunes_without_layer_decay(tmp_path):
    result = finetune.run(tuning(layer_decay=1.0), tmp_path)
    assert result["encoder"] == "toy" and 0.0 <= result["top1"] <= 1.0


def test_layer_decay_is_refused_without_an_order_of_layers(tmp_path):
    with pytest.raises(UserError, match=r"layer_decay=0.5 .*encoder.name='toy' .*1.0") as error:
        finetune.run(tuning(layer_decay=0.5), tmp_path)
    assert error.value.exit_code == BAD_INPUT and not list(tmp_path.iterdir()), "refused before anything is written"


@pytest.mark.parametrize("name", ["toy", "resnet18", "mobilenet_v2", "mobile_former_tiny", "vit_ti", "hcnet_nano"])
def test_parameters_that_take_any_size_are_kept(name):
    encoder = registry.encoder(name)
    params = {"cells": 1}
    assert encoder.image_size is None and encoder.resize(params, 96) == (params, {}, "")


def test_a_learnt_position_table_is_resized():
    encoder = registry.encoder("vit_ti", position="learnt", grid=2, class_token=True)
    assert encoder.image_size == 32
    params = {"pos_embed": jnp.ones((1, 5, 192)), "norm": {"scale": jnp.ones(192)}}
    resized = encoder.resize(params, 48)
    assert resized.options == {"grid": 3} and "2 x 2" in resized.notice and "48" in resized.notice
    assert resized.params["pos_embed"].shape == (1, 10, 192) and resized.params["norm"] is params["norm"]
    assert encoder.resize(params, 32) == (params, {}, "")


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "vit_ti", "convnext_t"])
def test_the_layer_order_covers_every_parameter(name):
    encoder = registry.encoder(name)
    params = jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    layers = {top: encoder.layer_of(top) for top in params}
    assert min(layers.values()) in (0, 1) and set(range(1, max(layers.values()) + 1)) <= set(layers.values())
