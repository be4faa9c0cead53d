"""Monitors and probes while training: off every other split, without a trace in the run's state, alike after a resume."""

import types

import jax
import numpy as np
import pytest

from qbheat_jax import api, data
from qbheat_jax.data import device_cache
from qbheat_jax.data.sources import base
from qbheat_jax.errors import UserError
from qbheat_jax.eval import monitors
from qbheat_jax.probe import cache, online
from qbheat_jax.tasks import pretrain, probe
from qbheat_jax.train import metrics
from tests.conftest import interrupt_after_save
from tests.probe_data import Blobs, config, tiny

FIELDS = {
    "monitors.images": 40,
    "monitors.views": 2,
    "monitors.probes": "knn,lin",
    "eval_every": 1,
    "checkpoint_every": 1,
}
NAMES = {f"online/{name}" for name in ("rankme", "alpha_req", "lidar", "knn", "lin")}


class TrainAlone(Blobs):
    """Whoever looks at the test images or their labels fails."""

    def images(self, split):
        assert split == "train"
        return super().images(split)

    def labels(self, split):
        assert split == "train"
        return super().labels(split)


def online_lines(workdir):
    return [line for line in metrics.read(workdir) if "online/rankme" in line]


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Workdirs of the same run with monitors, without, and with monitors but interrupted after its second step."""
    from qbheat_jax.train import config_tables
    from tests.conftest import SMALL, leave_one_device

    def of(**fields):
        return config_tables.resolve({**SMALL, **FIELDS, "total_steps": 4, "data.eval_split": "", **fields})

    place = {name: tmp_path_factory.mktemp(name) for name in ("with", "without", "resumed")}
    with pytest.MonkeyPatch.context() as patch:
        leave_one_device(patch)
        patch.setattr(data, "open_source", lambda *_, **__: TrainAlone())
        pretrain.run(of(), place["with"])
        pretrain.run(of(**{"monitors.images": 0}), place["without"])
        interrupt_after_save(patch, pretrain.loop.Checkpoints, 2, lambda: pretrain.run(of(), place["resumed"]))
        pretrain.run(of(), place["resumed"])
    return place


def test_every_evaluation_has_all_figures(watched):
    lines = online_lines(watched["with"])
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and all(NAMES <= set(line) for line in lines)
    assert all(0 < line["online/knn"] <= 1 and 1 <= line["online/rankme"] <= 16 for line in lines)
    assert not online_lines(watched["without"])


def test_the_run_is_the_same_without_them(watched):
    states = [api.load(watched[name]).variables for name in ("with", "without")]
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_a_resumed_run_has_the_same_figures(watched):
    assert online_lines(watched["resumed"]) == online_lines(watched["with"])


def test_the_figures_are_those_of_the_features():
    frozen, source = tiny(), Blobs()
    fields = {"monitors__images": 30, "monitors__views": 4}
    figures = online.of_encoder(config(**fields), frozen, source, "train")
    other = online.of_encoder(config(**fields, batch_size=64), frozen, source, "train")
    assert figures == pytest.approx(other, rel=1e-4) and set(figures) == {"rankme", "alpha_req", "lidar"}
    sample = online.sample(source, "train", 30, 0)
    images = np.stack([sample.fetch("online", i)[0] for i in range(30)])
    features = np.asarray(frozen.features(frozen.variables, images)).mean((1, 2))
    assert figures["rankme"] == pytest.approx(monitors.rankme(features), rel=1e-4)
    assert figures["alpha_req"] == pytest.approx(monitors.alpha_req(features), rel=1e-3)
    assert 1 < figures["lidar"] <= 7  # of the images 0, 4, ... 28


def test_images_come_from_the_device_cache_where_there_is_one(monkeypatch):
    opened, of = [], device_cache.of
    monkeypatch.setattr(device_cache, "of", lambda *a: opened.append(of(*a)) or opened[-1])
    fields = {"monitors__images": 16, "monitors__views": 0, "data__device_cache": True}
    figures = online.of_encoder(config(**fields), tiny(), Blobs(), "train")
    assert len(opened) == 1 and opened[0] is not None and figures["rankme"] > 1


def test_probes_of_an_encoder_share_the_monitors(tmp_path, monkeypatch):
    measured, measure = [], online.of_encoder
    monkeypatch.setattr(online, "of_encoder", lambda *a: measured.append(1) or measure(*a))
    monkeypatch.setattr(probe.encoders, "open_init", lambda *a, **k: tiny())
    monkeypatch.setattr(data, "open_source", lambda *_, **__: Blobs())
    store = cache.FeatureCache(tmp_path / "features")
    shared = {"monitors__images": 20, "monitors__views": 2, "data__source": "blobs"}
    for protocol in ({"protocol": "lin", "optimizer": "ridge", "weight_decays": (1.0,)}, {"protocol": "knn"}):
        result = probe.run(
            config(**shared, **protocol, knn__neighbours=(5,)), tmp_path / protocol["protocol"], "run", store
        )
        assert result["rankme"] > 1 and result["lidar"] > 1 and result["alpha_req"] > 0
    assert len(measured) == 1


def test_cross_validation_holds_out_what_it_measures():
    """Clear classes are told apart, though their order is that of the folds; labels without structure are at chance."""
    generator = np.random.default_rng(0)
    labels = np.arange(80) % 4
    clear = np.eye(4)[labels] + 0.01 * generator.normal(size=(80, 4))
    found = online.accuracies(clear.astype(np.float32), labels, ["knn", "lin"])
    assert found == {"knn": 1.0, "lin": 1.0}
    noise, labels = generator.normal(size=(400, 8)).astype(np.float32), generator.integers(0, 2, 400)
    for value in online.accuracies(noise, labels, ["knn", "lin"]).values():
        assert 0.4 < value < 0.6  # 1 if a vector were its own neighbour


def test_without_labels_or_with_one_class_there_are_no_probes():
    features = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
    for labels in (np.full(16, -1), np.zeros(16, int), np.r_[np.full(14, -1), 0, 1]):
        assert online.accuracies(features, labels, ["knn"]) == {}
    assert online.accuracies(features, np.arange(16) % 2, [""]) == {}


def test_crops_lie_in_the_image_and_have_their_area():
    draws = np.random.default_rng(0).random((500, 5)).astype(np.float32)
    top, left, height, width = np.asarray(online.crop_boxes(draws, 64, (0.3, 0.6), (3 / 4, 4 / 3))).T
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 64).all() and (left + width <= 64).all()
    assert 0.27 < (height * width / 64**2).min() and (height * width / 64**2).max() < 0.63
    assert len(np.unique(top)) > 10 and np.ptp(width / height) > 0.4


def test_a_stream_is_read_no_further_than_the_sample():
    class Stream(base.Source):
        random_access = False

        def __init__(self):
            super().__init__("stream", {"train": 1000}, None)
            self.read = 0

        def stream(self, split, **_):
            for index in range(1000):
                self.read += 1
                yield b"", -1, "", index

    source = Stream()
    sample = online.sample(source, "train", 7, 0)
    keep = (0, 1, np.arange(1))
    found = [item[3] for item in sample.stream("online", seed=0, epoch=0, shuffle=False, first=0, keep=keep)]
    assert found == list(range(7)) and source.read == 7


@pytest.mark.parametrize("field, value", [("monitors.probes", "svm"), ("monitors.views", 1), ("monitors.images", -1)])
def test_wrong_fields_are_refused(small_config, field, value):
    with pytest.raises(UserError, match=rf"{field}={value!r}"):
        small_config({field: value})


def test_the_progress_line_has_them(caplog):
    progress = metrics.Progress(0, 100, batch_size=4)
    progress.report(1, 2.0)
    progress.note({"val/loss": 1.0, "online/rankme": 12.345, "online/knn": 0.5})
    with caplog.at_level("INFO", "qbheat"):
        progress.report(2, 2.0)
    assert "RankMe 12.3, k-NN 0.5" in caplog.text and "val" not in caplog.text.split("images/s")[-1]


def test_batches_hold_whole_groups_of_views():
    for examples, views, devices in ((64, 8, 1), (2, 8, 1), (30, 4, 8), (1024, 6, 4), (7, 0, 2)):
        size = online.batch_size(examples, views, devices)
        assert size > 0 and size % devices == 0 and (not views or size % views == 0)


def test_clips_have_no_lidar(small_config):
    encoder = types.SimpleNamespace(takes_clips=True)
    objective = types.SimpleNamespace(encoder=encoder, pixels=None)
    evaluator = online.of_run(
        small_config({**FIELDS, "data.source": "synthetic:64"}), objective, data.open_source("synthetic:64")
    )
    assert evaluator._metric._views == 0
