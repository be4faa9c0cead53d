"""Probes: the same number for any batch size and device count, selection off the test images, honest baselines."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qbheat_jax import config as config_lib
from qbheat_jax import data
from qbheat_jax.errors import UserError
from qbheat_jax.eval.accuracy import top
from qbheat_jax.models.heads import BlockHead, LinearHead
from qbheat_jax.probe import encoders, features, fit, pmap
from qbheat_jax.probe.features import Features, standard
from qbheat_jax.probe.fields import PROBE
from qbheat_jax.tasks import pretrain, probe
from tests.probe_data import Blobs, config, tiny


@pytest.fixture
def blobs(monkeypatch):
    monkeypatch.setattr(data, "open_source", lambda *a, **k: Blobs())


@pytest.mark.parametrize("count", [1, 4, 8])
@pytest.mark.parametrize("batch", [1, 7, 16, 41, 64])
def test_pmap_batches_gives_each_row_once_for_any_split(monkeypatch, count, batch):
    chosen = jax.local_devices()[:count]
    monkeypatch.setattr(jax, "local_devices", lambda: chosen)
    rows = np.arange(41 * 3, dtype=np.float32).reshape(41, 3)
    weights = {"w": np.full((3,), 2.0, np.float32)}
    parts = pmap.pmap_batches(pmap.pmap(lambda v, x: (x * v["w"]).sum(-1)), weights, features.slices(rows, batch))
    np.testing.assert_array_equal(np.concatenate(list(parts)), (rows * 2).sum(-1))


def heads(count, classes=4):
    generator = np.random.default_rng(1)
    return {"classifier": {"kernel": generator.normal(size=(count, 5, classes)).astype(np.float32),
                           "bias": np.zeros((count, classes), np.float32)}}  # fmt: skip


def recipe(head=None, **fields):
    defaults = {
        "head": head or LinearHead(4), "classes": 4, "learning_rates": (0.1, 0.2), "weight_decays": (0.0, 0.0),
        "optimizer": "sgd", "momentum": 0.9, "epochs": 5.0, "warmup_epochs": 1.0, "batch_size": 16, "label_smoothing": 0.0,
    }  # fmt: skip
    return fit.Recipe(**{**defaults, **fields})


def accuracy(recipe, params, x, y):
    return top(fit.ranks(recipe, params, Features.of(x, y)))


def trained(recipe, x, y):
    return fit.fit(recipe, Features.of(x, y), 0)


def test_accuracy_is_the_plain_count_of_right_answers():
    generator = np.random.default_rng(2)
    x, y = generator.normal(size=(37, 5)).astype(np.float32), generator.integers(0, 4, 37)
    params = heads(2)
    got = accuracy(recipe(), params, x, y)
    for g in range(2):
        scores = x @ params["classifier"]["kernel"][g]
        assert got["top1"][g] == np.mean(scores.argmax(1) == y)
        top5 = np.argsort(-scores, 1)[:, :5]
        assert got["top5"][g] == np.mean([label in row for label, row in zip(y, top5)])


def test_a_head_that_says_the_same_of_all_or_nan_is_not_right():
    x, y = np.ones((8, 5), np.float32), np.zeros(8, np.int64)
    flat = jax.tree.map(np.zeros_like, heads(1))
    assert accuracy(recipe(), flat, x, y)["top1"][0] == 0
    broken = jax.tree.map(lambda p: np.full_like(p, np.nan), heads(1))
    assert accuracy(recipe(), broken, x, y)["top1"][0] == 0


@pytest.mark.parametrize("optimizer", ["sgd", "lars", "adamw"])
def test_a_grid_trained_at_once_equals_each_trained_alone(optimizer):
    generator = np.random.default_rng(3)
    x = generator.normal(size=(48, 5)).astype(np.float32)
    y = (x[:, 0] > 0).astype(np.int32)
    rates, decays = (0.01, 0.1, 0.1), (0.0, 0.0, 0.1)
    both = trained(recipe(optimizer=optimizer, learning_rates=rates, weight_decays=decays), x, y)
    for g, (rate, decay) in enumerate(zip(rates, decays)):
        alone = trained(recipe(optimizer=optimizer, learning_rates=(rate,), weight_decays=(decay,)), x, y)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[g], b[0], atol=1e-5), both, alone)  # noqa: B023


def test_ridge_is_least_squares_with_a_penalty_on_the_weights_alone():
    generator = np.random.default_rng(6)
    x = generator.normal(size=(30, 3)) + 5.0
    y = generator.integers(0, 4, 30)
    got = fit.ridge(Features.of(x, y), 4, (1e-9, 0.3))["classifier"]
    plain = np.linalg.lstsq(np.c_[x, np.ones(30)], np.eye(4)[y], rcond=None)[0]
    np.testing.assert_allclose(np.r_[got["kernel"][0], got["bias"][:1]], plain, atol=1e-4)
    kernel, bias = got["kernel"][1].astype(np.float64), got["bias"][1]
    error = x @ kernel + bias - np.eye(4)[y]
    np.testing.assert_allclose(error.mean(0), 0, atol=1e-5)  # the gradients of what is minimised vanish
    np.testing.assert_allclose(x.T @ error / 30 + 0.3 * kernel, 0, atol=1e-5)


def test_ridge_probe(blobs, tmp_path):
    result = probe.run(config(optimizer="ridge", weight_decays=(1e-3, 0.1)), tmp_path, "histogram")
    assert result["top1"] == 1.0 and "learning_rate" not in result["hparams"]
    for fields in ({"protocol": "tran-1", "weight_decays": (1.0,)}, {"weight_decays": (0.0, 1.0)}):
        with pytest.raises(UserError, match="is not accepted"):
            config(optimizer="ridge", **fields)


def test_heads_learn_and_a_diverging_rate_only_loses():
    generator = np.random.default_rng(4)
    x = generator.normal(size=(256, 5)).astype(np.float32)
    y = (x[:, 0] > 0).astype(np.int32) + 2 * (x[:, 1] > 0).astype(np.int32)
    r = recipe(learning_rates=(1.0, 100.0), weight_decays=(0.0, 1.0), epochs=20.0)
    top1 = accuracy(r, trained(r, x, y), x, y)["top1"]
    assert top1[0] > 0.9 and top1[1] == 0


def test_the_block_head_sees_where_a_cell_is():
    """A classifier of pooled cells could not tell these two classes apart; the transformer block does."""
    generator = np.random.default_rng(5)
    x = generator.normal(size=(64, 4, 4, 8)).astype(np.float32) * 0.1
    y = np.arange(64, dtype=np.int32) % 2
    x[y == 0, 0, 0, 0] += 3.0
    x[y == 1, 3, 3, 0] += 3.0
    r = recipe(
        BlockHead(2, 1, 16, 2), classes=2, optimizer="adamw", learning_rates=(0.05,), weight_decays=(0.0,), epochs=40.0
    )
    assert accuracy(r, trained(r, x, y), x, y)["top1"][0] > 0.95


def test_only_the_head_is_trained(blobs, tmp_path, monkeypatch, one_device):
    """The encoder's variables never enter the function that is differentiated: features are all that does."""
    seen = []
    original = jax.value_and_grad

    def watched(loss):
        return lambda params, x, *rest: seen.append((set(params), x.ndim)) or original(loss)(params, x, *rest)

    monkeypatch.setattr(jax, "value_and_grad", watched)
    monkeypatch.setattr(encoders, "open_init", lambda *a: tiny())
    for augment in (False, True):
        probe.run(config(total_epochs=1, augment=augment), tmp_path / str(augment), "tiny")
    assert len(seen) >= 4 and all(entry == ({"classifier"}, 2) for entry in seen)


@pytest.mark.parametrize("protocol", ["lin", "tran-1"])
def test_result_json_holds_the_contract(blobs, tmp_path, protocol, one_device):
    result = probe.run(config(protocol=protocol), tmp_path, "random")
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert result["protocol"] == protocol and result["init"] == "random" and result["data"] == "blobs"
    assert result["n"] == 41 and result["seed"] == 0 and result["classes"] == 4 and result["n_train"] == 104
    assert 0.25 <= result["top1"] <= result["top5"] == 1.0
    assert result["hparams"]["learning_rate"] in (0.03, 1.0)
    assert result["chance"] == pytest.approx(11 / 41)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert lines[-1]["probe/holdout_top1"] == result["holdout_top1"]


def test_trivial_features_solve_a_trivial_task(blobs, tmp_path, one_device):
    assert probe.run(config(), tmp_path / "h", "histogram")["top1"] == 1.0
    assert probe.run(config(), tmp_path / "p", "pixels")["top1"] == 1.0


def test_the_number_does_not_depend_on_devices(blobs, tmp_path, monkeypatch):
    eight = probe.run(config(), tmp_path / "8", "random")
    for count in (1, 4):
        with monkeypatch.context() as patch:
            chosen = jax.local_devices()[:count]
            patch.setattr(jax, "local_devices", lambda chosen=chosen: chosen)
            assert probe.run(config(), tmp_path / str(count), "random")["top1"] == eight["top1"]


@pytest.mark.parametrize("shape, head", [((5,), LinearHead(4)), ((2, 2, 8), BlockHead(4, 1, 8, 2))])
def test_a_trained_heads_number_does_not_depend_on_devices_or_batch(shape, head, monkeypatch):
    """41 images, so that the last batch is never full; the place of the true class is the same for each of them."""
    generator, everything = np.random.default_rng(8), jax.local_devices()
    features = Features.of(generator.normal(size=(41, *shape)).astype(np.float32), generator.integers(0, 4, 41))
    keys = jax.random.split(jax.random.key(0), 2)
    params = jax.jit(jax.vmap(lambda key: head.init(key, jnp.zeros((1, *shape)))["params"]))(keys)
    params = jax.tree.map(lambda p: np.asarray(p) + generator.normal(size=p.shape).astype(np.float32), params)
    found = []
    for count, batch in ((8, 16), (1, 41), (4, 7), (8, 1)):
        monkeypatch.setattr(jax, "local_devices", lambda count=count: everything[:count])
        found.append(fit.ranks(recipe(head, batch_size=batch), params, features))
    assert found[0].shape == (41, 2) and len(np.unique(found[0])) == 4
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])


@pytest.fixture
def noisy(monkeypatch):
    """Images that the tiny encoder tells apart with mistakes, so that an accuracy has something to get wrong."""

    class Noisy(Blobs):
        def images(self, split):
            noise = np.random.default_rng(len(split)).integers(0, 140, (self.splits[split], 1, 1, 3))
            return (super().images(split) // 2 + noise).clip(0, 255).astype(np.uint8)

    monkeypatch.setattr(data, "open_source", lambda *a, **k: Noisy())
    monkeypatch.setattr(encoders, "open_init", lambda *a: tiny())


WITHOUT_STEPS = ({"protocol": "knn"}, {"optimizer": "ridge", "weight_decays": (1e-3, 0.1)})


@pytest.mark.parametrize("fields", WITHOUT_STEPS)
def test_the_number_does_not_depend_on_the_batch(noisy, tmp_path, monkeypatch, fields):
    """Of what is not trained by steps, for which the batch is a matter of evaluation alone; 41 images are tested."""
    everything, numbers = jax.local_devices(), set()
    for count, batch in ((8, 16), (1, 41), (4, 7), (8, 1), (1, 64)):
        monkeypatch.setattr(jax, "local_devices", lambda count=count: everything[:count])
        result = probe.run(config(batch_size=batch, **fields), tmp_path / f"{count}-{batch}", "tiny")
        numbers.add((result["top1"], result["holdout_top1"], str(result["hparams"])))
    assert len(numbers) == 1 and 0.3 < result["top1"] < 1.0


PROTOCOLS = (
    {}, {"protocol": "tran-1"}, {"protocol": "knn"}, {"augment": True}, {"data__fraction": 0.3},
    {"optimizer": "ridge", "weight_decays": (1e-3, 0.1)},
)  # fmt: skip


@pytest.mark.parametrize("fields", PROTOCOLS)
def test_test_labels_have_no_say(noisy, tmp_path, monkeypatch, fields, one_device):
    """Shuffled test labels change the final number and nothing else; they are not read before it is asked for."""
    fields = {"total_epochs": 2, **fields}
    honest = probe.run(config(**fields), tmp_path / "a", "tiny")
    plain, finals = data.open_source("blobs"), []

    class Shuffled(type(plain)):
        def labels(self, split):
            assert split != "test" or finals, "test labels were read before the final evaluation"
            labels = super().labels(split)
            return np.random.default_rng(7).permutation(labels) if split == "test" else labels

    for method in (probe._Heads, probe._Neighbours):

        def finished(self, *args, original=method.__init__):
            original(self, *args)
            finals.append(self)

        monkeypatch.setattr(method, "__init__", finished)
    monkeypatch.setattr(data, "open_source", lambda *a, **k: Shuffled())
    shuffled = probe.run(config(**fields), tmp_path / "b", "tiny")
    final = ("top1", "top5", "seconds", "encode_images_per_second")
    assert {k: v for k, v in honest.items() if k not in final} == {k: v for k, v in shuffled.items() if k not in final}
    assert shuffled["top1"] != honest["top1"]
    curves = [(tmp_path / name / "metrics.jsonl").read_text() for name in "ab"]
    assert curves[0] == curves[1] and len(finals) == 1


def test_sixteen_rates_at_once_agree_with_logistic_regression():
    """`lin` on fixed features and scikit-learn's optimum, each as it is best on held-out images: within 1 point."""
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order].astype(np.float32), y[order]
    parts = {"train": slice(0, 700), "holdout": slice(700, 1000), "test": slice(1000, None)}
    mean, scale = standard([x[parts["train"]]])
    made = {name: Features.of(x[p], y[p]).standardised(mean, scale) for name, p in parts.items()}
    rates = tuple(0.001 * 2.0**k for k in range(16))
    plain = {name: made[name].take(np.arange(len(made[name]))) for name in made}
    regressions = [
        LogisticRegression(C=c, max_iter=300).fit(plain["train"], y[parts["train"]]) for c in (0.01, 0.1, 1.0, 10.0)
    ]
    best = max(regressions, key=lambda m: m.score(plain["holdout"], y[parts["holdout"]]))
    expected = best.score(plain["test"], y[parts["test"]])
    for optimizer in ("sgd", "lars"):
        r = recipe(LinearHead(10), classes=10, learning_rates=rates, weight_decays=(0.0,) * 16, optimizer=optimizer,
                   epochs=60.0, batch_size=100)  # fmt: skip
        params = fit.fit(r, made["train"], 0)
        held, tested = (top(fit.ranks(r, params, made[name]))["top1"] for name in ("holdout", "test"))
        assert len(held) == 16 and held.min() < held.max()
        assert abs(tested[np.argmax(held)] - expected) <= 0.01


@pytest.mark.parametrize(
    "fields",
    [
        {"protocol": "tran-2", "head__drop_path": 0.1},
        pytest.param({"protocol": "tran-4", "head__drop_path": 0.1}, marks=pytest.mark.weekly),
        pytest.param({}, marks=pytest.mark.weekly),
        {"data__fraction": 0.5},
    ],
)
def test_with_augmentation(noisy, tmp_path, fields):
    """From end to end: train and held-out images of one source, the head alone learns, nothing of train is cached."""
    fields = {"augment": True, "data__crop_scale": (0.5, 1.0), "total_epochs": 6, "optimizer": "adamw", **fields}
    config_ = config(learning_rates=(0.01, 0.03), **fields)
    result = probe.run(config_, tmp_path / "a", "tiny")
    assert result["top1"] > 0.4 and result["hparams"]["augment"] is True
    assert set(result["encode_images_per_second"]) == {"holdout", "test"}
    assert result["n_train"] == (104 if result["fraction"] == 1 else 52)
    if not fields.get("protocol"):
        again = probe.run(config_, tmp_path / "b", "tiny")
        assert again["top1"] == result["top1"] and again["holdout_top1"] == result["holdout_top1"]


def test_few_shot_probes_use_few_labels(noisy, tmp_path, monkeypatch):
    seen = []
    original = fit.fit
    monkeypatch.setattr(fit, "fit", lambda r, e, *a, **k: seen.append(e.labels) or original(r, e, *a, **k))
    result = probe.run(config(total_epochs=1, data__fraction=0.1), tmp_path, "tiny")
    np.testing.assert_array_equal(np.bincount(seen[0]), [2, 2, 2, 2])  # a tenth of 80
    np.testing.assert_array_equal(np.bincount(seen[1]), [3, 3, 3, 3])  # and of 24 to choose on
    assert (result["n_train"], result["n_holdout"], result["n"], result["fraction"]) == (12, 4, 41, 0.1)
    assert "lin, 10 % of the labels" in probe.table([result])


def test_neighbours_beyond_the_training_set_are_left_out_or_refused(noisy, tmp_path):
    result = probe.run(config(protocol="knn", knn__neighbours=(3, 1000)), tmp_path / "a", "tiny")
    assert result["hparams"]["neighbours"] == 3
    with pytest.raises(UserError, match="there are 80 training images"):
        probe.run(config(protocol="knn", knn__neighbours=(1000,)), tmp_path / "b", "tiny")


def test_without_a_val_split_a_part_of_train_is_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "open_source", lambda *a, **k: Blobs((("train", 80), ("test", 41))))
    result = probe.run(config(data__holdout=0.25, refit=False), tmp_path, "histogram")
    assert (result["n_holdout"], result["n_train"]) == (20, 60)


def test_standardised_features_have_mean_0_and_variance_1():
    generator = np.random.default_rng(0)
    x = generator.normal(3, 5, (100, 2, 2, 4)).astype(np.float32)
    x[..., 3] = 7.0  # a dead channel stays dead, and does not blow up
    mean, scale = standard([x[:7], x[7:60], x[60:]])
    got = Features.of(x, np.zeros(100)).standardised(mean, scale).take(np.arange(100))
    np.testing.assert_allclose(got[..., :3].mean((0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(got[..., :3].std((0, 1, 2)), 1, atol=1e-6)
    assert (got[..., 3] == 0).all() and scale[3] == 0
    np.testing.assert_allclose(mean, x.mean((0, 1, 2), dtype=np.float64), rtol=1e-12)


def test_pixels_and_histogram():
    images = np.zeros((2, 32, 32, 3), np.uint8)
    images[1] = [255, 0, 64]
    assert encoders.pixels(jnp.asarray(images)).shape == (2, 1, 1, 768)
    counts = np.asarray(encoders.histogram(jnp.asarray(images)))[:, 0, 0]
    np.testing.assert_allclose(counts.sum(1), 1, atol=1e-6)
    assert counts[0, 0] == 1 and counts[1, 3 * 16 + 0 * 4 + 1] == 1


@pytest.mark.parametrize(
    "fields, init, message",
    [
        ({"encoder__name": ""}, "random", "encoder.name=''"),
        ({"data__source": ""}, "random", "--init random .*data.source='', image_size=32"),
        ({"image_size": 0}, "histogram", "--init histogram .*image_size=0"),
        ({"image_size": 36}, "random", "image_size=36 is not accepted: pebble takes a multiple of its stride, 8"),
        ({"protocol": "tran-1"}, "pixels", "only protocol='lin' and 'knn' can probe"),
        ({"protocol": "tran-1", "head__width": 18, "head__heads": 4}, "random", "head.width=18 is not accepted"),
        ({}, "nowhere", "--init nowhere is not accepted"),
    ],
)
def test_what_cannot_be_probed_is_one_sentence(blobs, tmp_path, fields, init, message):
    with pytest.raises(UserError, match=message) as caught:
        probe.run(config(**fields), tmp_path, init)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize(
    "source, message",
    [
        (Blobs((("train", 80),)), "a probe needs train and test or val"),
        (Blobs(labelled=False), "has no labels"),
    ],
)
def test_data_without_labels_or_test_images(monkeypatch, tmp_path, source, message):
    monkeypatch.setattr(data, "open_source", lambda *a, **k: source)
    with pytest.raises(UserError, match=message):
        probe.run(config(), tmp_path, "random")


def test_a_probe_takes_the_run_it_is_given(small_config, tmp_path, one_device):
    pretrain.run(small_config(total_steps=2), tmp_path / "run")
    given = {"data.source": "synthetic:64", "total_epochs": 1, "batch_size": 16, "encoder.name": "vit_b"}
    result = probe.run(config_lib.resolve(given, PROBE), tmp_path / "probe", tmp_path / "run")
    assert result["encoder"] == "pebble" and result["step"] == 2 and result["init"] == str(tmp_path / "run")
