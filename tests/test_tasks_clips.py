"""Clips through every command: pre-training by quarters, supervised training, probes, classification."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qbheat_jax
from qbheat_jax import analysis, config, methods
from qbheat_jax.analysis.fields import ANALYSE
from qbheat_jax.data import open_source
from qbheat_jax.errors import BAD_INPUT, UserError
from qbheat_jax.methods.common.mixing import cutmix
from qbheat_jax.methods.qbheat import crop_visible
from qbheat_jax.models import registry
from qbheat_jax.models.mmhco import MMHCO, ClipHead
from qbheat_jax.probe.fields import PROBE
from qbheat_jax.report import run_page
from qbheat_jax.tasks import classify, pretrain, probe
from qbheat_jax.train import config_tables
from tests.conftest import leave_one_device

ROOT = Path(__file__).parent.parent
FIELDS = {
    "encoder.name": "clips_micro",
    "data.source": "shapes:32",
    "data.frames": 2,
    "data.flip": False,
    "image_size": 16,
    "batch_size": 8,
    "total_steps": 2,
    "decoder.width": 16,
    "decoder.depth": 0,
    "heat.init_scale": 0.1,
    "norm_pix": True,
    "hog": 0.5,
}


@pytest.fixture(scope="module", autouse=True)
def registered():
    with pytest.MonkeyPatch.context() as patch:
        leave_one_device(patch)
        fields = {"dims": (8, 12), "depths": (1, 1), "stem_stride": 2}
        entry = registry.Entry(MMHCO, fields, {4: {}}, registry.ENCODERS["mmhco_nano"].options, head=ClipHead)
        patch.setitem(registry.ENCODERS, "clips_micro", entry)
        yield


def of(**fields):
    return config_tables.resolve({**FIELDS, **{name.replace("__", "."): value for name, value in fields.items()}})


@pytest.fixture(scope="module")
def quarters(tmp_path_factory):
    """A workdir pre-trained by QB-Heat, and its summary."""
    workdir = tmp_path_factory.mktemp("quarters")
    return workdir, pretrain.run(of(), workdir)


@pytest.fixture(scope="module")
def supervised(tmp_path_factory):
    """A workdir trained on labels, and its summary."""
    workdir = tmp_path_factory.mktemp("supervised")
    return workdir, pretrain.run(of(objective="supervised", optimizer="sgd"), workdir)


def test_every_frame_of_a_clip_shows_the_same_quarter():
    clips = jnp.arange(3 * 2 * 2 * 8 * 8).reshape(3, 2, 2, 8, 8, 1)
    cropped = crop_visible(clips, jnp.array([0, 4, 8]))
    assert cropped.shape == (3, 2, 2, 4, 4, 1)
    for row, start in enumerate((0, 2, 4)):
        np.testing.assert_array_equal(cropped[row], clips[row, :, :, start : start + 4, start : start + 4])


def test_quarters_of_clips_train_and_reconstruct_the_mean_frames(quarters):
    workdir, summary = quarters
    assert summary["step"] == 2 and 0 < summary["val/loss"] < 1e4
    model = qbheat_jax.load(workdir)
    assert model.objective.target.widths == {"pixels": 4 * 4 * 6, "statistics": 2, "hog": 6 * 9}
    clips = np.random.default_rng(0).integers(0, 256, (2, 2, 2, 16, 16, 3), np.uint8)
    made = model.reconstruct(clips, 0)
    assert made.shape == (2, 16, 16, 6) and made.dtype == jnp.uint8
    kept = np.asarray(model.encoder.picture(jnp.asarray(clips)))
    np.testing.assert_array_equal(made[:, :8, :8], kept[:, :8, :8])
    assert (np.asarray(made[:, 8:]) != kept[:, 8:]).any()
    assert model.features(clips).shape == (2, 4, 4, 12)


@pytest.mark.parametrize("protocol", ["lin", "knn", "tran-1"])
def test_probes_encode_whole_clips(quarters, tmp_path, protocol):
    heads = {"head.heads": 4, "head.width": 8, "knn.neighbours": (3,), "total_epochs": 1.0}
    made = config.resolve({"protocol": protocol, "batch_size": 16, **heads}, PROBE)
    result = probe.run(made, tmp_path, quarters[0])
    assert (result["n"], result["classes"], result["frames"]) == (8, 8, 2) and 0 <= result["top1"] <= 1
    assert json.loads((tmp_path / "result.json").read_text())["encoder"] == "clips_micro"


def test_trivial_features_of_clips_are_of_all_frames(tmp_path):
    fields = {"data.source": "shapes:32", "image_size": 16, "encoder.name": "clips_micro", "data.frames": 2}
    made = config.resolve({**fields, "protocol": "knn", "knn.neighbours": (3,)}, PROBE)
    result = probe.run(made, tmp_path, "histogram")
    assert result["n"] == 8 and result["encoder"] == "histogram"


def test_a_classifier_of_clips_is_measured_by_clip(supervised, tmp_path):
    workdir, summary = supervised
    assert summary["step"] == 2 and 0 <= summary["val/top1"] <= 1
    result = classify.dataset(workdir, "shapes:32", workdir=tmp_path)
    assert (result["n"], result["classes"], result["split"]) == (8, 8, "test")
    assert 0 <= result["top1"] <= result["top5"] <= 1 and result["mean_class_accuracy"] == result["top1"]
    model, clips = qbheat_jax.load(workdir), open_source("shapes:32")
    assert model.class_names == list(clips.class_names)


def test_what_takes_images_alone_refuses_clips(supervised, quarters, tmp_path):
    workdir = supervised[0]
    refusals = {
        "image files": lambda: classify.images(workdir, ["cat.png"]),
        "source": lambda: classify.dataset(workdir, "synthetic:8"),
        "analyse": lambda: analysis.run(config.resolve({}, ANALYSE), tmp_path, str(workdir)),
        "images_every": lambda: pretrain.run(of(images_every=1), tmp_path),
        "colour_jitter": lambda: methods.build(
            of(objective="supervised", supervised__colour_jitter=0.4, head__classes=8)
        ),
        "rand_augment": lambda: methods.build(
            of(objective="supervised", supervised__rand_augment=9.0, head__classes=8)
        ),
    }
    for what, call in refusals.items():
        with pytest.raises(UserError) as caught:
            call()
        assert caught.value.exit_code == BAD_INPUT, what
    assert run_page.write(quarters[0]).exists()  # a page without pictures


def test_a_batch_of_clips_is_mixed_in_pairs():
    clips = jnp.stack([jnp.zeros((2, 3, 8, 8, 3)), jnp.ones((2, 3, 8, 8, 3))])
    mixed, weights = cutmix(clips, jnp.eye(2), jax.random.key(1), 1.0)
    share = mixed[0].mean()
    assert 0 < share < 1 and (mixed[0] == mixed[0, :1, :1]).all()
    np.testing.assert_allclose(weights, [[1 - share, share], [share, 1 - share]], atol=1e-6)


@pytest.mark.weekly
def test_the_generated_clips_are_learnt_from_scratch(tmp_path):
    """The config's own command in a process without the flags of these tests, which slow down what runs long."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "qbheat_jax", "pretrain", "--config", "configs/shapes_mmhco.py"]
    subprocess.run([*command, "--workdir", tmp_path / "run"], cwd=ROOT, env=environment, check=True)
    result = classify.dataset(tmp_path / "run", "shapes")
    assert result["top1"] >= 0.9 and result["mean_class_accuracy"] >= 0.9
