"""Which images train and choose: few-shot draws, hold-outs, and the source that shows some of another's images."""

import shutil

import numpy as np
import pytest
from PIL import Image

from qbheat_jax import config as config_lib
from qbheat_jax import data
from qbheat_jax.data.sources.base import ArraySource, Source
from qbheat_jax.errors import UserError
from qbheat_jax.probe import splits
from qbheat_jax.probe.fields import PROBE
from qbheat_jax.tasks import probe


def probe_config(**fields):
    return config_lib.resolve({name.replace("__", "."): value for name, value in fields.items()}, PROBE)


@pytest.mark.parametrize("fraction, each", [(0.01, 1), (0.1, 10), (0.5, 50)])
def test_few_are_balanced_whatever_the_classes_shares_are(fraction, each):
    labels = np.repeat([0, 1, 2, -1], [200, 60, 40, 50])
    rows = splits.few(labels, fraction, seed=0)
    np.testing.assert_array_equal(np.bincount(labels[rows]), np.minimum(each, [200, 60, 40]))
    assert len(np.unique(rows)) == len(rows)
    np.testing.assert_array_equal(rows, splits.few(labels, fraction, seed=0))
    assert (splits.few(labels, fraction, seed=1) != rows).any()


def test_hold_out_parts_and_balances():
    train, held = splits.hold_out(100, probe_config(data__holdout=0.25))
    assert len(held) == 25 and sorted([*train, *held]) == list(range(100))
    labels = np.repeat([0, 1, 2], 10)
    train, held = splits.hold_out(30, probe_config(data__holdout=0.25), labels)
    np.testing.assert_array_equal(np.bincount(labels[held]), [2, 2, 2])
    assert sorted([*train, *held]) == list(range(30))
    with pytest.raises(UserError, match="leaves 0 of 100 images to choose on"):
        splits.hold_out(100, probe_config(data__holdout=0.001))
    with pytest.raises(UserError, match="data.fraction=0.01 leaves 1 images a class"):
        splits.hold_out(3, probe_config(data__fraction=0.01), np.arange(3))


class Numbers(ArraySource):
    """Image i of train is filled with i; images of val with 100 + i."""

    def __init__(self):
        super().__init__("numbers", {"train": 20, "val": 6}, ["a", "b"])

    def images(self, split):
        first = 100 if split == "val" else 0
        return np.full((self.splits[split], 2, 2, 3), 1, np.uint8) * (
            first + np.arange(self.splits[split], dtype=np.uint8)[:, None, None, None]
        )

    def labels(self, split):
        return np.arange(self.splits[split]) % 2


class Streamed(Source):
    """The same, of which only a stream can be had, in an order that depends on the epoch."""

    random_access = False

    def __init__(self):
        super().__init__("streamed", {"train": 20, "val": 6}, ["a", "b"])

    def stream(self, split, *, seed, epoch, shuffle, first, keep):
        n = self.splits[split]
        order = np.random.default_rng((seed, epoch)).permutation(n) if shuffle else np.arange(n)
        shift, period, rows = keep
        for place in range(first, n):
            if (place + shift) % period in rows:
                yield b"", int(order[place]) % 2, f"{split}[{order[place]}]", int(order[place])


PARTS = {"both": [("train", [3, 5, 8, 13]), ("val", None)], "one": [("train", [2])]}


def test_a_subset_shows_its_images_and_labels():
    subset = splits.Subset(Numbers(), PARTS)
    assert subset.splits == {"both": 10, "one": 1}
    shown = [subset.fetch("both", i)[0][0, 0, 0] for i in range(10)]
    assert shown == [3, 5, 8, 13, 100, 101, 102, 103, 104, 105]
    np.testing.assert_array_equal(subset.labels("both"), [1, 1, 0, 1, 0, 1, 0, 1, 0, 1])
    identities = {splits.Subset(Numbers(), {"x": [("train", rows)]}).identity("x") for rows in ([1, 2], [1, 3], [1, 2])}
    assert len(identities) == 2


def test_a_subset_of_a_stream_is_one_stream_for_all_processes():
    subset = splits.Subset(Streamed(), PARTS)
    order = dict(seed=1, epoch=2, shuffle=True)
    whole = [item[2] for item in subset.stream("both", first=0, keep=(0, 1, np.arange(1)), **order)]
    assert sorted(whole) == sorted([f"train[{i}]" for i in (3, 5, 8, 13)] + [f"val[{i}]" for i in range(6)])
    assert [item[2] for item in subset.stream("both", first=7, keep=(0, 1, np.arange(1)), **order)] == whole[7:]
    halves = [[item[2] for item in subset.stream("both", first=0, keep=(0, 2, np.array([h])), **order)] for h in (0, 1)]
    assert halves == [whole[::2], whole[1::2]]


class Unlisted(Numbers):
    """Knows an image's label only once it has been fetched."""

    def labels(self, split):
        return None

    def fetch(self, split, index):
        return self.images(split)[index], index % 2, ""


@pytest.mark.parametrize("source", [Numbers(), Streamed(), Unlisted()])
def test_labels_are_read_where_a_source_does_not_know_them(source):
    np.testing.assert_array_equal(splits.labels(source, "train"), np.arange(20) % 2)


def test_a_class_that_only_val_has_is_named_and_val_is_not_called_test(tmp_path):
    for name in ("train/a", "train/b", "val/a", "val/b", "test/a", "test/b", "val/plum"):
        for n in range(3):
            path = tmp_path / name / f"{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16), (20 * n, 200 if "a" in name else 10, 0)).save(path)
    fields = {"protocol": "knn", "data.source": f"folder:{tmp_path}", "image_size": 16, "batch_size": 6}
    config = config_lib.resolve({**fields, "knn.neighbours": (1,)}, PROBE)
    with pytest.raises(UserError) as caught:
        probe.run(config, tmp_path / "out", "pixels")
    assert "'plum'" in str(caught.value) and "3 images" in str(caught.value) and caught.value.exit_code == 2

    shutil.rmtree(tmp_path / "val" / "plum")
    assert probe.run(config, tmp_path / "out", "pixels")["split"] == "test"
    shutil.rmtree(tmp_path / "test")
    result = probe.run(config, tmp_path / "out", "pixels")
    assert result["split"] == "val" and "6 val images" in probe.line(result) and "6 of val" in probe.table([result])
    assert data.open_source(f"folder:{tmp_path}").splits == {"train": 6, "val": 6}
