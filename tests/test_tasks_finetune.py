"""Fine-tuning: it learns, every layer's rate is what it should be, images are mixed as said, tested once at the end."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qbheat_jax import api, cli, data, methods
from qbheat_jax import config as config_lib
from qbheat_jax.errors import UserError
from qbheat_jax.methods.common import mixing
from qbheat_jax.methods.supervised import Supervised
from qbheat_jax.models import registry
from qbheat_jax.models.vit import ViT
from qbheat_jax.tasks import finetune
from qbheat_jax.train import config_tables, optim
from tests.conftest import leave_one_device
from tests.probe_data import Blobs

registry.ENCODERS.setdefault(
    "nano",
    registry.Entry(ViT, dict(width=16, heads=2, depth=2), {8: {"patch": 8}}, ("class_token", "position", "grid")),
)
GIVEN = {
    "init": "random", "data.source": "blobs", "image_size": 32, "encoder.name": "nano", "batch_size": 16, "total_steps": 2,
    "learning_rate": 0.1, "log_every": 1, "mixup": 0.2, "cutmix": 1.0,
}  # fmt: skip


def config(**fields):
    return config_lib.resolve({**GIVEN, **{k.replace("__", "."): v for k, v in fields.items()}}, config_tables.FINETUNE)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """(workdir, result) of a run that is long enough to learn, watched on val, tested on test."""
    workdir, read = tmp_path_factory.mktemp("tuned"), []

    class ImageSummaries(Blobs):
        def labels(self, split):
            read.append(split)
            return super().labels(split)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "open_source", lambda *a, **k: ImageSummaries())
        leave_one_device(patch)
        fields = dict(total_steps=60, ema=0.9, eval_every=20, checkpoint_every=20, mixup=0.1, cutmix=0.0)
        result = finetune.run(config(**fields), workdir)
        assert set(read[read.index("test") :]) == {"test"} and set(read) == {"train", "val", "test"}, "test comes last"
        assert finetune.run(config(**fields), workdir) == result, "a finished run is left alone"
    return workdir, result


def test_it_learns_and_is_a_model_that_can_be_loaded(tuned):
    workdir, result = tuned
    assert result["top1"] > 0.9 and result["holdout_top1"] > 0.9 and result["n"] == 41 and result["step"] == 60
    assert result["protocol"] == "finetune" and result["init"] == "random" and result["chance"] == 11 / 41
    assert json.loads((workdir / "result.json").read_text()) == result
    model = api.load(workdir)
    assert model.class_names == list("abcd")
    blobs = Blobs()
    found = np.asarray(model.logits(blobs.images("test"))).argmax(1)
    assert np.mean(found == blobs.labels("test")) == result["top1"]


def test_it_starts_from_the_encoder_of_a_workdir(tuned, tmp_path, monkeypatch, one_device):
    monkeypatch.setattr(data, "open_source", lambda *a, **k: Blobs())
    given = dict(init=str(tuned[0]), encoder__name="", image_size=0, data__source="", total_steps=1)
    result = finetune.run(config(learning_rate=1e-12, weight_decay=0.0, data__fraction=0.5, **given), tmp_path)
    before, after = api.load(tuned[0]).variables["params"], api.load(tmp_path).variables["params"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), before["encoder"], after["encoder"])
    assert not np.allclose(before["head"]["classifier"]["kernel"], after["head"]["classifier"]["kernel"])
    assert result["encoder"] == "nano" and result["image_size"] == 32 and result["n_train"] == 40
    assert json.loads((tmp_path / "config.json").read_text())["encoder"]["drop_path"] == 0.1


@pytest.mark.parametrize("count, batch", [(1, 41), (4, 7), (8, 16)])
def test_accuracy_does_not_depend_on_devices_or_batch(tuned, monkeypatch, count, batch):
    chosen = jax.devices()[:count]
    monkeypatch.setattr(jax, "devices", lambda *a: chosen)
    model = api.load(tuned[0])
    fields = config(batch_size=batch, head__classes=4)
    evaluator = finetune.accuracy(model.objective, Blobs(), "test", fields)
    names = ("top1", "top5", "mean_class_accuracy")
    assert evaluator(model.variables) == {f"test/{name}": tuned[1][name] for name in names}
    assert tuned[1]["top5"] == 1.0
    assert evaluator.measured.n == 41


def test_the_number_of_devices_changes_nothing_in_training(tmp_path, monkeypatch):
    """Mixed pairs lie on different devices: the losses are those of one device all the same."""
    monkeypatch.setattr(data, "open_source", lambda *a, **k: Blobs())
    everything, losses = jax.devices(), []
    for count in (8, 1):
        monkeypatch.setattr(jax, "devices", lambda *a, count=count: everything[:count])
        fields = config(total_steps=3, learning_rate=1e-3, encoder__name="vit_micro")
        finetune.run(fields, tmp_path / str(count))
        lines = [json.loads(line) for line in (tmp_path / str(count) / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["train/loss"] for line in lines if "train/loss" in line])
    assert len(losses[0]) == 3
    np.testing.assert_allclose(*losses, rtol=1e-4)


def multipliers(name, **fields):
    """The learning-rate multipliers of an encoder and its head at a decay of 0.5."""
    fields = {"encoder__name": name, "head__classes": 4, "image_size": 64, **fields}
    objective = methods.build(config(**fields))
    batch = {"image": jnp.zeros((2, 64, 64, 3), jnp.uint8)}
    params = jax.eval_shape(objective.init, jax.random.key(0), batch)["params"]
    return finetune.lr_multipliers(params, objective.encoder, 0.5)


def test_layer_decay_by_name():
    vit = multipliers("nano", encoder__class_token=True)
    blocks = vit["encoder"]["patch_embed"]["kernel"], vit["encoder"]["class_token"]
    assert blocks == (0.125, 0.125) and vit["head"]["classifier"]["kernel"] == 1.0
    assert [set(jax.tree.leaves(vit["encoder"][b])) for b in ("block0", "block1", "norm")] == [{0.25}, {0.5}, {1.0}]

    resnet = multipliers("resnet18")["encoder"]
    order = ["conv1", "layer1_0", "layer1_1", "layer2_0", "layer2_1", "layer3_0", "layer3_1", "layer4_0", "layer4_1"]
    found = {top: set(jax.tree.leaves(tree)) for top, tree in resnet.items()}
    assert [found[top] for top in order] == [{0.5 ** (9 - k)} for k in range(9)] and found["bn1"] == {0.5**9}

    former = multipliers("mobile_former_294m")  # eleven blocks and more: 10 comes after 9
    count = sum(top.startswith("features_") for top in former["encoder"])
    found = {top: set(jax.tree.leaves(tree)) for top, tree in former["encoder"].items()}
    assert [found[f"features_{k}"] for k in range(count)] == [{0.5 ** (count - k)} for k in range(count)]
    assert found["tokens"] == found["stem"] == {0.5 ** (count + 1)} and found["local_global"] == {1.0}

    mobilenet = multipliers("mobilenet_v2")["encoder"]
    found = {top: set(jax.tree.leaves(tree)) for top, tree in mobilenet.items()}
    assert [found[f"block{k}"] for k in range(1, 18)] == [{0.5 ** (18 - k)} for k in range(1, 18)]
    assert found["stem"] == {0.5**18} and found["last"] == {1.0}


def test_factors_multiply_the_whole_update():
    """The rate of the layer: what AdamW does and its decay both, after clipping."""
    params = {
        "encoder": {"class_token": {"w": jnp.ones((2, 2))}, "block0": {"w": jnp.ones((2, 2))}},
        "head": {"b": jnp.ones(2)},
    }
    gradients = jax.tree.map(lambda p: 3.0 * p, params)
    for clip in (0.0, 1.0):
        fields = config(weight_decay=0.3, clip_norm=clip)
        updates = []
        for lr_multipliers in (None, lambda p: finetune.lr_multipliers(p, ViT(depth=1), 0.5)):
            optimizer = optim.optimizer(fields, optax.constant_schedule(0.01), lr_multipliers)
            updates.append(optimizer.update(gradients, optimizer.init(params), params)[0])
        ratio = jax.tree.map(lambda a, b: float((b / a).mean()), *updates)
        assert ratio["encoder"]["class_token"]["w"] == pytest.approx(0.25)
        assert ratio["encoder"]["block0"]["w"] == pytest.approx(0.5) and ratio["head"]["b"] == pytest.approx(1.0)


@pytest.fixture
def pairs():
    generator = np.random.default_rng(0)
    return jnp.asarray(generator.normal(size=(4, 12, 10, 3)), jnp.float32), jnp.eye(4)


def test_mixup_weighs_images_as_targets(pairs):
    images, targets = pairs
    weights = []
    for seed in range(20):
        mixed, labels = mixing.mixup(images, targets, jax.random.key(seed), 0.8)
        weight = float(labels[0, 0])
        np.testing.assert_allclose(labels, weight * targets + (1 - weight) * targets[::-1], atol=1e-6)
        np.testing.assert_allclose(mixed, weight * images + (1 - weight) * images[::-1], atol=1e-5)
        weights.append(weight)
    assert min(weights) < 0.3 and max(weights) > 0.7


def test_cutmix_weighs_targets_by_the_pixels_that_are_there(pairs):
    images, targets = pairs
    weights = []
    for seed in range(20):
        mixed, labels = map(np.asarray, mixing.cutmix(images, targets, jax.random.key(seed), 1.0))
        own = (mixed == np.asarray(images)).all(-1)
        other = (mixed == np.asarray(images)[::-1]).all(-1)
        assert (own ^ other).all() and (own == own[:1]).all()
        rows, columns = np.where(other[0])
        if len(rows):
            box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
            assert box == other[0].sum(), "what was replaced is a box"
        assert labels[0, 0] == pytest.approx(own.mean(), abs=1e-6) and labels.sum() == pytest.approx(4)
        weights.append(labels[0, 0])
    assert min(weights) < 0.5 and max(weights) > 0.9


def test_the_loss_counts_pairs_of_images_alone_and_evaluation_mixes_nothing():
    objective = methods.build(
        config(head__classes=4, cutmix=0.0, mixup=0.5, label_smoothing=0.0, encoder__drop_path=0.0)
    )
    blobs = Blobs()
    batch = {"image": blobs.images("train")[:6], "label": blobs.labels("train")[:6], "mask": np.ones(6, bool)}
    variables = jax.jit(objective.init)(jax.random.key(0), batch)
    logits = jax.jit(lambda images: objective.logits(variables, images))
    loss = jax.jit(lambda batch: objective.loss(variables["params"], {}, batch, jax.random.key(1))[0])
    key, _, _ = jax.random.split(jax.random.key(1), 3)
    x, y = mixing.mixup(objective.pixels.normalise(batch["image"]), jax.nn.one_hot(batch["label"], 4), key, 0.5)
    each = optax.softmax_cross_entropy(logits(x), y)
    np.testing.assert_allclose(loss(batch), each.mean(), rtol=1e-4)
    np.testing.assert_allclose(loss({**batch, "mask": np.arange(6) > 0}), each[1:5].mean(), rtol=1e-4)
    plain = Supervised(objective.encoder, objective.head, objective.pixels)
    evaluated, expected = (
        jax.jit(lambda batch, method=method: method.loss(variables["params"], {}, batch, None, False)[0])(batch)
        for method in (objective, plain)
    )
    assert evaluated == expected


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"init": ""}, "init='' is not accepted"),
        ({"encoder__name": ""}, "encoder.name='' must all be set"),
        ({"image_size": 33}, "image_size=33 is not accepted"),
        ({"batch_size": 128}, "80 images in train to train on, fewer than batch_size=128"),
        ({"data__fraction": 0.1}, "8 images in train to train on"),
        ({"data__split": "test"}, "it is the split that is tested on"),
        ({"init": "nowhere"}, "init='nowhere' is not accepted"),
    ],
)
def test_what_cannot_be_is_one_sentence(monkeypatch, tmp_path, fields, message):
    monkeypatch.setattr(data, "open_source", lambda *a, **k: Blobs())
    with pytest.raises(UserError, match=message) as caught:
        finetune.run(config(**fields), tmp_path / "w")
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    assert not (tmp_path / "w").exists()


def test_the_command(tmp_path, capsys, monkeypatch, one_device):
    monkeypatch.setattr(data, "open_source", lambda *a, **k: Blobs())
    path = tmp_path / "recipe.py"
    path.write_text(f"def get_config():\n    return { {k: v for k, v in GIVEN.items() if k != 'init'}!r}\n")
    command = [
        "finetune",
        "--config",
        str(path),
        "--init",
        "random",
        "--workdir",
        str(tmp_path / "w"),
        "--config.ema",
        "0.5",
    ]
    assert cli.main(command) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 41
    assert cli.main([*command[:-2], "--config.layer_decay", "0"]) == 2
    assert "layer_decay=0" in capsys.readouterr().err
    assert cli.main(["report", "--workdir", str(tmp_path / "w")]) == 2
    assert "fine-tuned classifier" in capsys.readouterr().err
