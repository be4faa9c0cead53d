"""What every objective owes the one loop: sharded = unsharded, resumed = uninterrupted, a model that loads, a report."""

import shutil

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import qbheat_jax
from qbheat_jax import data, device_mesh, methods, pytree, report, rng
from qbheat_jax.errors import UserError
from qbheat_jax.tasks import pretrain
from qbheat_jax.train import config_tables, metrics, optim, sharding, state
from tests.conftest import SMALL

CASES = {
    "moco": {"encoder.name": "pebble", "moco.queue": 48, "moco.momentum": 0.9, "moco.width": 16, "moco.blur_share": 0.0},
    "mae": {"encoder.name": "vit_micro", "decoder.depth": 0},
    "simmim": {"encoder.name": "pebble", "simmim.mask_size": 8},
    "simclr": {"encoder.name": "pebble", "simclr.hidden": 16, "simclr.width": 8, "views.blur": False, "views.jitter": 0.0},
    "vicreg": {"encoder.name": "pebble", "vicreg.width": 16, "views.blur": False, "views.jitter": 0.0},
    "lejepa": {
        "encoder.name": "pebble", "lejepa.hidden": 16, "lejepa.width": 8, "lejepa.slices": 16, "data.local_crops": 2,
        "data.local_size": 16, "views.blur": False, "views.jitter": 0.0,
    },
    "dino": {
        "encoder.name": "pebble", "dino.prototypes": 16, "dino.hidden": 16, "dino.bottleneck": 8, "data.local_crops": 2,
        "data.local_size": 16, "views.blur": False, "views.jitter": 0.0,
    },
    "ijepa": {"encoder.name": "vit_micro", "decoder.depth": 0},
    "finola": {
        "encoder.name": "pebble", "finola.width": 16, "finola.stride": 1, "finola.heads": 2, "finola.channels": 8,
    },
    "supervised": {
        "encoder.name": "pebble", "supervised.label_smoothing": 0.1, "supervised.colour_jitter": 0.4,
        "supervised.rand_augment": 9.0, "supervised.erasing": 0.5, "supervised.mixup": 0.8, "supervised.cutmix": 1.0,
    },
}  # fmt: skip


def config_of(name, **fields):
    return config_tables.resolve({**SMALL, "objective": name, "ema": 0.9, "total_steps": 4, **CASES[name], **fields})


def train(config, mesh, steps=2):
    """-> (losses, state after so many steps of random batches)."""
    objective = methods.build(config)
    optimizer = optim.optimizer(config, optim.schedule(config, 6, 64))
    key = rng.root(config.seed)
    shapes = methods.batch_spec(config).shapes(config.batch_size)
    current, shardings = state.create(objective, optimizer, shapes, key, mesh, config.ema)
    step = state.train_step(objective, optimizer, key, shardings, mesh, config.ema)
    generator, losses = np.random.default_rng(0), []
    for _ in range(steps):
        batch = {
            name: generator.integers(0, 256 if shape.ndim > 1 else 2, shape.shape).astype(shape.dtype)
            for name, shape in shapes.items()
        }
        current, figures = step(current, device_mesh.put_batch({**batch, "mask": np.arange(16) > 0}, mesh))
        losses.append(float(figures["loss"]))
    assert step._cache_size() == 1
    return losses, current


@pytest.mark.parametrize("name", CASES)
def test_sharded_equals_unsharded(name, monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST_SPLIT", 16)
    config = config_of(name, **({"head.classes": 4} if name == "supervised" else {}))
    losses, expected = train(config, device_mesh.make_mesh({"data": 1, "fsdp": 1}, jax.devices()[:1]))
    got, final = train(config, device_mesh.make_mesh({"data": 2, "fsdp": 4}))
    np.testing.assert_allclose(got, losses, rtol=2e-5)
    parts = [(s.params, s.batch_stats) for s in (expected, final)]
    for (leaf, a), (_, b) in zip(*map(pytree.names, parts)):
        np.testing.assert_allclose(a, b, atol=2e-4, err_msg=leaf)
    split = [leaf for leaf, p in pytree.names(final) if not p.sharding.is_fully_replicated]
    assert any(leaf.startswith("params/encoder") for leaf in split)
    if name == "moco":  # what follows the parameters lies where they lie
        ours, follows = ({leaf.split("/", skip)[-1] for leaf in split if part in leaf} for part, skip in (
            ("params/encoder/", 2), ("batch_stats/key_encoder/params/", 3)
        ))  # fmt: skip
        assert ours == follows and ours
        assert expected.batch_stats["queue"].shape == (48, 16) and int(final.batch_stats["pointer"]) == 32


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    """Bit for bit is promised on one device. What one run compiles serves the next: they are the same programs."""
    device = jax.devices()[:1]
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *a: device)
        try:
            for name, value in settings.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()


@pytest.fixture(scope="module", params=CASES)
def whole(request, one_device, tmp_path_factory):
    """(name, workdir, summary) of an uninterrupted run of four steps."""
    workdir = tmp_path_factory.mktemp(request.param)
    return request.param, workdir, pretrain.run(config_of(request.param, ema=0.0), workdir)


def test_resumed_equals_uninterrupted(whole, tmp_path):
    name, workdir, summary = whole
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")  # as if it had been killed at the third step
    resumed = pretrain.run(config_of(name, ema=0.0), tmp_path / "run")
    assert resumed["steps_run"] == 2 and resumed["val/loss"] == summary["val/loss"]
    expected, got = (qbheat_jax.load(path).variables for path in (workdir, tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, expected, got)
    if name == "moco":
        assert int(got["batch_stats"]["steps"]) == 4 and int(got["batch_stats"]["pointer"]) == 16


def test_the_run_is_a_model(whole):
    name, workdir, summary = whole
    model = qbheat_jax.load(workdir)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    assert model.features(images).shape == (3, 4, 4, 16)
    if name == "finola":
        assert model.reconstruct(images).shape == images.shape and summary["val/psnr"] < 20
        with pytest.raises(UserError, match="quarter=0"):
            model.reconstruct(images, 0)
    else:
        with pytest.raises(UserError, match="objective='qbheat' or 'finola'"):
            model.reconstruct(images, 0)
    if name == "supervised":
        assert model.logits(images).shape == (3, 10) and model.class_names[:2] == ["class0", "class1"]
        assert model.config.head.classes == 10 and "val/top1" in summary
    else:
        with pytest.raises(UserError, match="has no classifier"):
            model.logits(images)


def test_the_run_has_a_report(whole):
    name, workdir, _ = whole
    text = report.write(workdir).read_text()
    title = methods.METHODS[name].TITLE
    assert f"<h1>{title} on synthetic:64</h1>" in text
    own = name == "finola"  # it reconstructs, and has A and B
    assert ("There are no pictures on this page" in text, "no heat operator" in text) == (not own, not own)
    assert text.count(": reconstruction by FINOLA") == 8 * own == text.count(": the original image")
    assert (workdir / "report" / "reconstructions.png").exists() == own
    assert ("No labels are used" in text) == (name != "supervised")
    assert ("Dashed: the loss of predicting the mean" in text) == (name in ("mae", "finola"))
    lines = [line for line in metrics.read(workdir) if "train/loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 4] and "far features are spread" in text
    assert all(line["train/feature_std"] > 0 and line["train/participation_ratio"] >= 1 for line in lines)


def test_moco_starts_its_key_encoder_from_the_given_weights_too(whole, one_device, tmp_path):
    name, workdir, _ = whole
    if name != "simmim":
        pytest.skip("one encoder to start from is enough")
    config = config_of("moco", ema=0.0, init=str(workdir), total_steps=1, warmup=0, learning_rate=1e-30)
    pretrain.run(config, tmp_path / "run")
    given, got = (qbheat_jax.load(path).variables for path in (workdir, tmp_path / "run"))
    key = got["batch_stats"]["key_encoder"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), key["params"], given["params"]["encoder"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), key["batch_stats"], given["batch_stats"]["encoder"]
    )


def test_supervised_takes_its_classes_from_the_data(tmp_path):
    source = data.open_source("synthetic:64", image_size=32)
    assert pretrain.with_classes(config_of("supervised"), source).head.classes == 10
    with pytest.raises(UserError, match="head.classes=7 is not accepted: synthetic:64 has 10 classes in train"):
        pretrain.with_classes(config_of("supervised", **{"head.classes": 7}), source)
    from PIL import Image

    for n in range(8):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{n}.png")
    with pytest.raises(UserError, match="has no labels"):
        pretrain.with_classes(config_of("supervised"), data.open_source(f"folder:{tmp_path}"))
