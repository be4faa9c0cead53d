"""MMHCO-HAR's files, as mmengine saves them, and a run that begins with vHeat's weights."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import qbheat_jax
from qbheat_jax import methods, port, pretrained, pytree
from qbheat_jax.errors import UserError
from qbheat_jax.models import registry
from qbheat_jax.models.mmhco import MMHCO, ClipHead
from qbheat_jax.models.vheat import VHeat
from qbheat_jax.train import config_tables, state
from tests.test_port_workdir import saved, state_dict

SIZES = {"dims": (8, 12), "depths": (1, 1), "stem_stride": 2, "post_norm": True, "layer_scale": True}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for name, module, like, head in (("clips", MMHCO, "mmhco_s", ClipHead), ("heat", VHeat, "vheat_s", None)):
        given = {} if head is None else {"head": head}
        entry = registry.Entry(module, SIZES, {4: {}}, registry.ENCODERS[like].options, **given)
        monkeypatch.setitem(registry.ENCODERS, f"small_{name}", entry)


@pytest.fixture
def arrays():
    return state_dict("small_clips", **{"encoder.grid": 8})


def equal(left, right):
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def test_an_mmengine_file_there_and_back(arrays, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    for name in ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer"):
        module = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
    module.HistoryBuffer = type("HistoryBuffer", (), {"__module__": module.__name__})
    history = module.HistoryBuffer()
    history._log_history = np.arange(3.0)
    leftovers = {
        "backbone.freq_embed_rgb": np.ones((7, 7, 12), np.float32),
        "backbone.freq_embed_event": np.ones((7, 7, 12), np.float32),
        "backbone.freq_conv1_rgb.1.num_batches_tracked": np.array(9),
    }
    held = {name: torch.from_numpy(np.array(array)) for name, array in {**arrays, **leftovers}.items()}
    path = tmp_path / "epoch_30.pth"
    torch.save({"meta": {"epoch": 30}, "state_dict": held, "message_hub": {"log_scalars": {"loss": history}}}, path)

    provenance = port.port(path, "small_clips", tmp_path / "in", classes=10)
    assert set(provenance["ignored"]) == set(leftovers) and not provenance["dropped"]
    assert provenance["renamed"].keys() == arrays.keys()
    model = qbheat_jax.load(tmp_path / "in")
    assert (model.config.image_size, model.config.encoder.fve_mode) == (16, "noise")
    clips = np.random.default_rng(0).integers(0, 256, (2, 2, 3, 16, 16, 3), np.uint8)
    first, second = model.logits(clips), model.logits(clips)
    assert first.shape == (2, 10) and np.isfinite(first).all() and np.array_equal(first, second)
    port.export(tmp_path / "in", tmp_path / "out.safetensors")
    assert equal(load_file(tmp_path / "out.safetensors"), arrays)
    with pytest.raises(UserError) as caught:
        model.features(clips[:, 0, 0])
    assert "[B, 2, T, H, W, 3]" in str(caught.value) and caught.value.exit_code == 2


def test_a_backbone_alone_and_a_classifier_that_is_dropped(arrays, tmp_path):
    bare = {name.removeprefix("backbone."): array for name, array in arrays.items() if name.startswith("backbone.")}
    assert port.port(saved(tmp_path / "bare.safetensors", bare), "small_clips", tmp_path / "a", head="drop")["names"]
    whole = port.port(saved(tmp_path / "whole.safetensors", arrays), "small_clips", tmp_path / "b", head="drop")
    assert sorted(whole["dropped"]) == ["cls_head.fc_cls.bias", "cls_head.fc_cls.weight"]
    alike = [qbheat_jax.load(tmp_path / name).encoder_variables for name in "ab"]
    jax.tree.map(np.testing.assert_array_equal, *alike)


NEW = {
    "freq_embed_rgb", "freq_embed_event", "freq_conv1_rgb/conv/kernel", "freq_conv1_event/conv/kernel",
    *(f"freq_conv1_{m}/bn/{leaf}" for m in ("rgb", "event") for leaf in ("scale", "bias")),
    *(f"layers_{n}_0/op/fusion/router/fc{k}/{leaf}" for n in (0, 1) for k in (0, 1, 2) for leaf in ("kernel", "bias")),
    *(f"layers_{n}_0/op/fusion/router/bn{k}/{leaf}" for n in (0, 1) for k in (0, 1) for leaf in ("scale", "bias")),
    *(f"layers_{n}_0/op/fusion/gate/{leaf}" for n in (0, 1) for leaf in ("kernel", "bias")),
    *(f"layers_{n}_0/op/fusion/gate_bn/{leaf}" for n in (0, 1) for leaf in ("scale", "bias")),
}  # fmt: skip


def test_vheats_weights_leave_exactly_the_new_parameters_unfilled(tmp_path):
    given = state_dict("small_heat", **{"encoder.grid": 8})
    port.port(saved(tmp_path / "net.safetensors", given), "small_heat", tmp_path / "heat", classes=10)
    fields = {"objective": "supervised", "init": str(tmp_path / "heat"), "head.classes": 8, "data.source": "shapes"}
    fields |= {"encoder.name": "small_clips", "image_size": 16, "batch_size": 2, "total_steps": 1}
    config = config_tables.resolve(fields)
    start = pretrained.pretraining(config)

    batch = {"image": np.zeros((1, 2, 1, 16, 16, 3), np.uint8)}
    made = jax.eval_shape(methods.build(config).init, jax.random.key(0), batch)
    made = jax.tree.map(lambda x: jnp.full(x.shape, -7.0), made)  # the ported arrays are between 0 and 1
    before = state.TrainState(0, made["params"], made["batch_stats"], {}, {})
    after = state.load_params(before, start)
    old, new = dict(pytree.names(before.params["encoder"])), dict(pytree.names(after.params["encoder"]))
    assert {name for name in old if np.array_equal(old[name], new[name])} == NEW
    heat = dict(pytree.names(qbheat_jax.load(tmp_path / "heat").encoder_variables["params"]))
    assert all(np.array_equal(new[name], heat[name]) for name in new if name not in NEW)
    assert set(heat) - set(new) == {"freq_embed_0", "freq_embed_1"}

    for wrong in ({"encoder.name": "mmhco_nano"}, {"pixels": "half"}):
        with pytest.raises(UserError) as caught:
            pretrained.pretraining(config_tables.resolve({**fields, **wrong}))
        assert "init=" in str(caught.value) and caught.value.exit_code == 2
