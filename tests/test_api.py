"""`qbheat_jax.load`: a ported classifier's features, logits and position codes, and what is refused."""

import json
import shutil

import jax
import numpy as np
import pytest

import qbheat_jax
from qbheat_jax import api, methods, pretrained, rng
from qbheat_jax import config as config_lib
from qbheat_jax.errors import UserError
from qbheat_jax.tasks import pretrain
from qbheat_jax.train import config_tables
from qbheat_jax.train.checkpoint import Checkpoints

VIT = {"encoder.name": "vit_ti", "encoder.class_token": True, "encoder.position": "learnt", "encoder.grid": 2}


def make_workdir(path, fields):
    """A ported workdir with random weights -> (its path, the variables)."""
    config = config_lib.resolve({"objective": "classifier", "image_size": 32, **fields}, config_tables.CLASSIFIER)
    batch = {"image": np.zeros((1, 32, 32, 3), np.uint8)}
    variables = jax.jit(methods.build(config).init)(rng.root(0), batch)
    saved = Checkpoints(path)
    state = {"step": np.int32(0), **variables, "opt_state": {}, "ema": {}}
    saved.save(0, state, 0, config_lib.to_json(config))
    saved.wait()
    saved.close()
    (path / "config.json").write_text(config_lib.to_json(config))
    return path, jax.device_get(variables)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    pixels = {"pixels": "half"}
    return make_workdir(tmp_path_factory.mktemp("classifier"), {"encoder.name": "pebble", "head.classes": 7, **pixels})


@pytest.fixture(scope="module")
def transformer(tmp_path_factory):
    return make_workdir(tmp_path_factory.mktemp("transformer"), VIT)


IMAGES = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)


def test_a_classifier_comes_back_whole(classifier):
    path, variables = classifier
    model = qbheat_jax.load(path)
    jax.tree.map(np.testing.assert_array_equal, model.variables, variables)
    logits = model.logits(IMAGES)
    assert logits.shape == (3, 7) and model.features(IMAGES).shape == (3, 4, 4, 16)
    by_hand = IMAGES.astype(np.float32) / 255.0 * 2.0 - 1.0
    np.testing.assert_allclose(model.logits(by_hand, normalized=True), logits, atol=1e-5)
    assert model.class_names is None
    with pytest.raises(UserError, match="only a run of objective="):
        model.reconstruct(IMAGES, 0)


def test_class_names_come_from_the_workdir(classifier):
    path, _ = classifier
    (path / "classes.tsv").write_text("".join(f"k{n}\tname {n}\n" for n in range(7)))
    assert qbheat_jax.load(path).class_names == [f"name {n}" for n in range(7)]
    (path / "classes.tsv").unlink()


def test_a_learnt_position_code_is_resampled_for_another_size(transformer, caplog):
    caplog.set_level("INFO", "qbheat")
    model = qbheat_jax.load(transformer[0])
    assert model.sized(32).encoder_variables["params"]["pos_embed"].shape == (1, 5, 192)
    larger = model.sized(64)
    assert "position code of 2 x 2 cells resampled to 4 x 4" in caplog.text
    assert larger.encoder_variables["params"]["pos_embed"].shape == (1, 17, 192) and larger.config.encoder.grid == 4
    assert larger.features(np.repeat(np.repeat(IMAGES, 2, 1), 2, 2)).shape == (3, 4, 4, 192)
    with pytest.raises(UserError, match="vit_ti has no classifier"):
        model.logits(IMAGES)


def test_a_size_that_the_stride_does_not_divide_is_refused(classifier):
    with pytest.raises(UserError, match="image_size=36 is not accepted: pebble takes a multiple of its stride, 8"):
        qbheat_jax.load(classifier[0]).sized(36)


def test_pre_training_starts_from_a_ported_encoder(classifier, small_config, tmp_path):
    path, variables = classifier
    fields = {"init": str(path), "pixels": "half", "ema": 0.5}
    # A rate of nothing: what comes out is what went in.
    config = small_config({**fields, "learning_rate": 1e-30, "total_steps": 2})
    pretrain.run(config, tmp_path / "run")
    model = api.load(tmp_path / "run")
    got, expected = (v["params"]["encoder"] for v in (model.variables, variables))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-20), got, expected)
    assert "decoder" in model.variables["params"]


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"encoder.name": "mobile_former_tiny"},
            r"has an encoder with encoder.name='pebble' \(not 'mobile_former_tiny'\)",
        ),
        ({"pixels": "lite"}, r"has an encoder with pixels='half' \(not 'lite'\): set"),
        ({"init": "pixels"}, "init='pixels' is not accepted"),
        ({"init": "nowhere"}, "init='nowhere' is not accepted"),
    ],
)
def test_another_encoder_to_start_from_is_refused(classifier, small_config, tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        pretrain.run(small_config({"init": str(classifier[0]), **fields}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_shape_to_start_from_is_refused(small_config, tmp_path, monkeypatch):
    wrong = {"params": {"encoder": {"tokens": np.zeros((1, 1), np.float32)}}}
    monkeypatch.setattr(pretrained, "pretraining", lambda config: wrong)
    with pytest.raises(UserError, match="the weights to start from are of another model: .* of params"):
        pretrain.run(small_config({"init": "random"}), tmp_path / "run")


# --- config.json is what the checkpoint was made with ----------------------------------------------------------------


def edited(workdir, **fields):
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(config | fields))
    return workdir


@pytest.mark.parametrize(
    "field, value, old",
    [
        ("image_size", 64, 32),
        ("pixels", "lite", "half"),
        ("head", {"classes": 5}, 7),
        ("objective", "qbheat", "classifier"),
        ("encoder", {"name": "micro"}, "pebble"),
    ],
)
@pytest.mark.parametrize("read", [api.load, api.read_config])
def test_a_config_that_was_edited_is_refused(classifier, tmp_path, read, field, value, old):
    workdir = edited(shutil.copytree(classifier[0], tmp_path / "run"), **{field: value})
    with pytest.raises(UserError) as caught:
        read(workdir)
    now = next(iter(value.values())) if isinstance(value, dict) else value
    assert caught.value.exit_code == 2
    assert f"{field}" in str(caught.value) and f"={now!r}" in str(caught.value) and f"={old!r}" in str(caught.value)


def test_a_field_that_was_taken_out_of_config_json_is_one_that_was_edited(classifier, tmp_path):
    workdir = shutil.copytree(classifier[0], tmp_path / "run")
    config = json.loads((workdir / "config.json").read_text())
    del config["pixels"]
    (workdir / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="pixels='imagenet'.*pixels='half'"):
        api.load(workdir)


@pytest.mark.parametrize("damage", ["lost", "empty", "torn"])
@pytest.mark.parametrize("read", [api.load, api.read_config])
def test_a_checkpoint_that_lost_its_config_is_refused(classifier, tmp_path, read, damage):
    workdir = shutil.copytree(classifier[0], tmp_path / "run")
    there = workdir / "checkpoints" / "0" / "config"
    if damage == "torn":
        for file in there.iterdir():
            file.write_text(file.read_text()[:20])
    else:
        shutil.rmtree(there)
        if damage == "empty":
            there.mkdir()
    with pytest.raises(UserError, match=r"checkpoints \[0\].*config") as caught:
        read(workdir)
    assert caught.value.exit_code == 2


def test_a_file_that_is_no_text_is_no_config(classifier, tmp_path):
    workdir = shutil.copytree(classifier[0], tmp_path / "run")
    for content in (b"\xff\xfe\x00", b"[1, 2]", b"{"):
        (workdir / "config.json").write_bytes(content)
        with pytest.raises(UserError, match="holds no run that can be read"):
            api.load(workdir)
