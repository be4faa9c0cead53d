"""Clips: `shapes` and `har:`, their batches, what is refused and what is skipped; a run on them from end to end."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from qbheat_jax import api, cli, data, methods
from qbheat_jax.data import augment, decode
from qbheat_jax.data.bad_files import BadFiles
from qbheat_jax.data.clip import Clip
from qbheat_jax.data.sources import shapes
from qbheat_jax.data.sources.base import Source
from qbheat_jax.errors import BAD_INPUT, RUN_FAILED, UserError
from qbheat_jax.eval.accuracy import Accuracy
from qbheat_jax.ops.images import Pixels
from qbheat_jax.ops.quarters import PLACEMENT_SETS
from qbheat_jax.tasks import finetune, pretrain
from qbheat_jax.tools import doctor
from qbheat_jax.train import config_tables
from tests.har_files import write_har

SCALES = (1.0, 0.875, 0.75, 0.66)
SPEC = data.ClipsSpec(32, 5, PLACEMENT_SETS["all9"], True, flip=True, frames=4, scales=SCALES)


def refused(call, *args, code=BAD_INPUT, words=(), **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and caught.value.exit_code == code
    assert all(word in message for word in words), message


def take(batches, count):
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def same(a, b):
    assert len(a) == len(b) > 0
    for one, other in zip(a, b):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name], name)


@pytest.fixture(scope="module")
def moving():
    return data.open_source("shapes:16")


@pytest.fixture(scope="module")
def written(moving, tmp_path_factory):
    """(folder, paths by split) of `moving` as files."""
    folder = tmp_path_factory.mktemp("har")
    return folder, write_har(folder, moving)


# --- shapes ----------------------------------------------------------------------------------------------------------


def test_shapes_counts_and_labels(moving):
    assert data.describe(moving) == "shapes:16: train 16, val 4, test 4 clips; 8 classes"
    assert data.open_source("shapes").splits == {"train": 512, "val": 128, "test": 128}
    np.testing.assert_array_equal(moving.labels("train"), np.arange(16) % 8)
    image, label, name = moving.fetch("validation", 3)
    assert image.shape == (48, 48, 3) and image.dtype == np.uint8 and label == 3 and "val[3]" in name
    for wrong in ("shapes:7", "shapes:few", "shapes:"):
        refused(data.open_source, wrong, words=[f"'{wrong}'"])


def test_shapes_are_part_of_the_data_set(moving):
    """Written down, so that no change of numpy or of this code changes the data set unnoticed."""
    rgb, events = shapes.frames("train", 9)
    assert rgb.shape == (8, 48, 48, 3) and events.shape == (8, 48, 48, 1)
    assert [int((events == value).sum()) for value in (shapes.FELL, shapes.QUIET, shapes.ROSE)] == [2238, 14032, 2162]
    (first,) = data.open_source("shapes:800").clip("train", 9).read([2])
    np.testing.assert_array_equal(first[0], rgb[2])
    np.testing.assert_array_equal(first[1], events[2])
    assert (shapes.frames("val", 9)[0] != rgb).any() and (shapes.frames("test", 9)[0] != rgb).any()


def test_events_tell_the_direction():
    """Brightness rises where shapes arrive and falls where they leave: what fell, moved ahead, is what rose."""
    angles = 2 * np.pi * np.arange(8) / 8
    steps = np.rint(5 * np.stack([np.sin(angles), np.cos(angles)], -1)).astype(int)
    right = 0
    for index in range(64):
        events = shapes.frames("train", index)[1][..., 0]
        rose, fell = events == shapes.ROSE, events == shapes.FELL
        alike = [(rose & np.roll(fell, step, (1, 2))).sum() for step in steps]
        right += np.argmax(alike) == index % 8
    assert right >= 61, right


def test_a_single_rgb_frame_does_not():
    """Linear classifiers of the middle RGB frame or of its colours are near chance, 1 in 8."""
    clips = {split: [shapes.frames(split, k)[0] for k in range(n)] for split, n in (("train", 256), ("test", 64))}
    features = {
        "pixels": lambda rgb: rgb[4, ::2, ::2].ravel(),
        "colours": lambda rgb: np.bincount(rgb[4].reshape(-1, 3) // 32 @ [64, 8, 1], minlength=512),
    }
    for name, feature in features.items():
        a, b = (np.stack([feature(rgb) for rgb in clips[split]]).astype(np.float64) for split in clips)
        a, b = a - a.mean(0), b - a.mean(0)
        gram = a @ a.T
        weights = a.T @ np.linalg.solve(gram + gram.trace() / 1e4 * np.eye(256), np.eye(8)[np.arange(256) % 8] - 1 / 8)
        assert ((b @ weights).argmax(1) == np.arange(64) % 8).mean() < 0.25, name


# --- Batches ---------------------------------------------------------------------------------------------------------


def test_batches_hold_what_the_shapes_say(moving):
    expected = {name: (x.shape, x.dtype) for name, x in SPEC.shapes(4).items()}
    assert expected["image"] == ((4, 2, 4, 32, 32, 3), np.uint8) and expected.keys() == {
        "image",
        "quarter",
        "label",
        "mask",
    }
    (batch,) = take(data.train_batches(moving, SPEC, split="train", batch_size=4), 1)
    assert {name: (x.shape, x.dtype) for name, x in batch.items() if name in expected} == expected
    assert batch["mask"].all() and (batch["label"] == batch["index"] % 8).all()


def test_the_stream_depends_on_the_position_alone(moving, written):
    """Not on workers, processes, an interruption, or whether frames come from memory or from files of either layout."""
    how = {"split": "train", "batch_size": 4}
    whole = take(data.train_batches(moving, SPEC, **how), 9)
    assert len(np.unique(np.concatenate([batch["index"] for batch in whole[:4]]))) == 16
    assert (
        len({x.tobytes() for batch in whole for x in batch["image"]}) == 36
    )  # every epoch shows other frames or crops
    same(whole[5:], take(data.train_batches(moving, SPEC, **how, position=20), 4))
    files = data.open_source(f"har:{written[0]}")
    for workers in (1, 3):
        same(whole, take(data.train_batches(files, SPEC, **how, workers=workers), 9))
    halves = [take(data.train_batches(files, SPEC, **how, process_index=k, process_count=2), 9) for k in (0, 1)]
    same(whole, [{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(*halves)])
    assert len({batch["quarter"].tobytes() for batch in whole}) > 1
    np.testing.assert_array_equal(whole[0]["quarter"], SPEC.quarters(np.zeros(4, int), whole[0]["index"]))


def test_evaluation_shows_whole_frames_of_each_segments_middle(moving):
    spec = data.ClipsSpec(48, 5, frames=4, scales=SCALES)
    batches = list(data.eval_batches(moving, spec, split="test", batch_size=3))
    assert [batch["mask"].tolist() for batch in batches] == [[True] * 3, [True, False, False]]
    rgb, events = shapes.frames("test", 1)
    np.testing.assert_array_equal(batches[0]["image"][1, 0], rgb[1::2])
    np.testing.assert_array_equal(batches[0]["image"][1, 1], np.repeat(events[1::2], 3, -1))
    assert (batches[1]["image"][1:] == np.array([124, 116, 104])).all()
    same(batches, list(data.eval_batches(moving, data.ClipsSpec(48, 9, frames=4), split="test", batch_size=3)))


@pytest.mark.parametrize("count, frames", [(8, 8), (50, 8), (7, 3), (3, 8)])
def test_one_frame_of_each_segment(count, frames):
    spec = data.ClipsSpec(32, 1, train=True, frames=frames)
    drawn = np.array([spec.numbers(0, index, count) for index in range(400)])
    edges = np.arange(frames + 1) * count / frames
    for t in range(frames):
        assert set(drawn[:, t]) == set(range(int(edges[t]), int(np.ceil(edges[t + 1]))))
    middle = spec.evaluation().numbers(3, 4, count)
    np.testing.assert_array_equal(middle, ((edges[:-1] + edges[1:]) / 2).astype(int))


def test_multi_scale_boxes():
    boxes = {augment.multi_scale_box(np.random.default_rng(k), 40, 100, SCALES) for k in range(3000)}
    sides = [40, 35, 30, 26]
    assert {box[2:] for box in boxes} == {
        (h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) < 2
    }
    assert all(0 <= top <= 40 - h and 0 <= left <= 100 - w for top, left, h, w in boxes)
    places = {(top, left) for top, left, h, w in boxes if (h, w) == (30, 30)}
    assert places == {
        (0, 0), (0, 70), (10, 0), (10, 70), (5, 35), (0, 35), (10, 35), (5, 0), (5, 70), (2, 17), (2, 52), (7, 17), (7, 52)
    }  # fmt: skip


class Ramp(Source):
    """Clips all of whose frames are one image, in which no two pixels are alike."""

    clips = plain = True

    def __init__(self):
        super().__init__("ramp", {"train": 64}, None)
        rows, columns = np.mgrid[:40, :60]
        self.image = np.stack([6 * rows, 4 * columns, rows + columns], -1).astype(np.uint8)

    def clip(self, split, index):
        return Clip(9, -1, str(index), lambda numbers: [(self.image, self.image) for _ in numbers])


def test_all_frames_are_cropped_and_mirrored_alike():
    (batch,) = take(data.train_batches(Ramp(), SPEC, split="train", batch_size=64), 1)
    frames = batch["image"].reshape(64, 8, 32, 32, 3)
    assert (frames == frames[:, :1]).all()
    mirrored = frames[:, 0, 0, 0, 1].astype(int) > frames[:, 0, 0, -1, 1]
    assert 16 < mirrored.sum() < 48
    np.testing.assert_array_equal(mirrored, SPEC.mirrored(np.zeros(64, int), batch["index"]))
    assert len({x.tobytes() for x in frames[:, 0]}) > 32


# --- har: ------------------------------------------------------------------------------------------------------------


def test_har_describes_what_is_there(written, moving, capsys):
    source = data.open_source(f"har:{written[0]}")
    assert source.splits == moving.splits and source.class_names == list("01234567") and not source.notes
    np.testing.assert_array_equal(source.labels("train"), moving.labels("train"))
    content, label, name = source.fetch("train", 11)
    np.testing.assert_array_equal(decode.decode(content), moving.fetch("train", 11)[0])
    assert label == 3 and name.endswith("train/3/clip011")
    assert cli.main(["doctor", "--data", f"har:{written[0]}"]) == 0
    out = capsys.readouterr().out
    assert "train 16, val 4, test 4 clips; 8 classes" in out and "16 of 16 clips" in out


@pytest.mark.parametrize("how", [{"stride": 1}, {"stride": 3, "offset": 2}, {"inside": True}])
def test_har_strides_and_folders(how, moving, tmp_path):
    write_har(tmp_path, moving, splits=("val",), **how)
    numbers = f",{how['stride']},{how.get('offset', 0)}" if "stride" in how else ""
    (got,) = data.eval_batches(
        data.open_source(f"har:{tmp_path}{numbers}"), SPEC.evaluation(), split="val", batch_size=4
    )
    (expected,) = data.eval_batches(moving, SPEC.evaluation(), split="val", batch_size=4)
    same([got], [expected])


def test_har_takes_a_list_of_either_folder_and_absolute_ones(written, moving, tmp_path):
    pairs = written[1]["val"]
    lines = [f"{pair[k % 2]} 8 {k}\n" for k, pair in enumerate(pairs)]
    (tmp_path / "val_label.txt").write_text("\ufeff" + "\r\n".join(lines))
    (got,) = data.eval_batches(data.open_source(f"har:{tmp_path}"), SPEC.evaluation(), split="val", batch_size=4)
    (expected,) = data.eval_batches(moving, SPEC.evaluation(), split="val", batch_size=4)
    same([got], [expected])


@pytest.mark.parametrize(
    "text, words",
    [
        ("a 8\n", ("line 1", "'a 8'")),
        ("ok 8 0\n\na eight 0\n", ("line 3", "'a eight 0'")),
        ("a 0 1\n", ("line 1",)),
        ("a 8 -1\n", ("line 1",)),
        ("a 8 1.0\n", ("line 1",)),
        ("a 8 9999999999999\n", ("line 1",)),
        ("\n \n", ("train_label.txt",)),
        ("elsewhere 8 0\n", ("train_label.txt", "elsewhere_aps")),
        (b"\xff\xfe\x00", ("train_label.txt",)),
    ],
)
def test_har_refuses_a_list(text, words, tmp_path):
    (tmp_path / "ok_aps").mkdir()
    path = tmp_path / "train_label.txt"
    path.write_bytes(text) if isinstance(text, bytes) else path.write_text(text)
    refused(data.open_source, f"har:{tmp_path}", words=[f"har:{tmp_path}", *words])


def test_har_refuses_a_spec(tmp_path):
    for given in ("", ",5", f"{tmp_path},0", f"{tmp_path},x", f"{tmp_path},5,0,1", f"{tmp_path},-1"):
        refused(data.open_source, f"har:{given}", words=[f"'har:{given}'"])
    refused(data.open_source, f"har:{tmp_path}", words=["train_label.txt"])
    refused(data.open_source, f"har:{tmp_path}/nowhere", words=["nowhere"])


def test_har_labels_of_other_splits(tmp_path):
    for name in "abcd":
        (tmp_path / f"{name}_aps").mkdir()
    (tmp_path / "train_label.txt").write_text("a 8 7\nb 8 2\nb 8 7\n")
    (tmp_path / "val_label.txt").write_text("c 8 2\n")
    (tmp_path / "test_label.txt").write_text("a 8 7\nd 8 9\nd 8 1\n")
    source = data.open_source(f"har:{tmp_path}")
    assert source.class_names == ["2", "7"] == source.classes("val")
    assert [source.labels(split).tolist() for split in ("train", "val", "test")] == [[1, 0, 1], [0], [1, -1, -1]]
    source.check_labels("train", "val")
    refused(source.check_labels, "train", "test", words=["1, 9"])
    refused(source.check_labelled, "test", words=["2 images"])
    gaps, both = source.notes
    assert " 6 " in gaps and "first: 0" in gaps and "train_label.txt and test_label.txt" in both and "first: a" in both


def broken(folder, pairs):
    """Damage clips 0 to 4 of a split as the test below lists it."""
    (pairs[0][0] / "00000020.png").unlink()
    path = pairs[1][1] / "00000005.png"
    path.write_bytes(path.read_bytes()[:200])
    for number in range(4, 8):
        (pairs[2][1] / f"{5 * number:08}.png").unlink()
    Image.new("RGB", (20, 20)).save(pairs[3][1] / "00000015.png")
    for file in pairs[4][1].iterdir():
        file.unlink()
    pairs[4][1].rmdir()


def test_har_skips_and_counts_damaged_clips(moving, tmp_path, capsys):
    pairs = write_har(tmp_path, moving, splits=("train",))["train"]
    source = data.open_source(f"har:{tmp_path}")
    before = source.identity("train")
    broken(tmp_path, pairs)
    spec, bad = data.ClipsSpec(32, frames=8), BadFiles(1.0, 16)
    for _ in range(2):
        batches = list(data.eval_batches(source, spec, split="train", batch_size=16, bad=bad))
    (batch,) = batches
    assert batch["mask"].tolist() == [False] * 5 + [True] * 11 and batch["index"].tolist() == list(range(16))
    assert (batch["image"][:5] == np.array([124, 116, 104])).all()
    assert bad.names == tuple(str(tmp_path / f"train/{k % 8}/clip{k:03}") for k in range(5))
    reasons = [bad._names[name] for name in bad.names]
    assert "00000020.png" in reasons[0] and "8 frames" in reasons[0] and "7 RGB and 8 event" in reasons[0]
    assert reasons[1].startswith("event frame 1: ")
    assert "8 RGB and 4 event" in reasons[2] and "8 RGB and 0 event" in reasons[4]
    assert "48 x 48" in reasons[3] and "20 x 20" in reasons[3]
    assert source.identity("train") != before
    strict = BadFiles(0.3, 16)
    refused(list, data.eval_batches(source, spec, split="train", batch_size=16, bad=strict), code=RUN_FAILED)
    report = doctor.describe_data(f"har:{tmp_path}")
    assert "11 of 16 clips" in report and sum(line.startswith("    ") for line in report.splitlines()) == 5


# --- Metrics, and a run ----------------------------------------------------------------------------------------------


def test_mean_class_accuracy_by_hand():
    """Class 0 is right in 3 of 4, class 1 in 0 of 1; class 2 has no examples; a masked row does not count."""
    found = jnp.eye(3)[jnp.array([0, 0, 0, 2, 0, 2])]
    method = SimpleNamespace(pixels=Pixels(), logits=lambda variables, images: found)
    metric = Accuracy(method, None, "test", 3)
    batch = {
        "image": np.zeros((6, 2, 1, 4, 4, 3), np.uint8),
        "label": np.array([0, 0, 0, 0, 1, 2]),
        "mask": np.arange(6) < 5,
    }
    sums = jax.device_get(jax.jit(metric.sums)({}, batch))
    figures, details = metric.figures(metric.add(metric.add(None, sums), sums))
    assert figures == {"top1": 0.6, "top5": 1.0, "mean_class_accuracy": 0.375} and details == {"chance": 0.8}


RUN = {
    "data.source": "shapes:16", "data.flip": False, "data.frames": 2, "image_size": 16, "batch_size": 8, "total_steps": 2,
    "encoder.name": "pebble_clips", "learning_rate": 1e-3, "log_every": 1, "init": "random",
}  # fmt: skip


def test_fine_tuning_and_pre_training_take_clips(tmp_path):
    result = finetune.run(resolved("finetune", **{"data.fraction": 0.5, "layer_decay": 1.0}), tmp_path / "tuned")
    assert (result["n_train"], result["n"], result["classes"]) == (8, 4, 8)
    assert 0 <= result["mean_class_accuracy"] <= result["top5"] <= 1
    summary = pretrain.run(resolved("supervised", init=""), tmp_path / "run")
    assert summary["step"] == 2 and np.isfinite(summary["val/loss"])
    model = api.load(tmp_path / "run")
    assert model.class_names == list(shapes.CLASSES)
    assert methods.batch_spec(model.config).frames == 2
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["clip_scales"] == list(SCALES)


def resolved(objective, **fields):
    return config_tables.resolve({**RUN, "objective": objective, **fields})


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"objective": "moco"}, ("objective='moco'", "pebble_clips")),
        ({"objective": "supervised", "data.source": "photos"}, ("data.source='photos'", "har:PATH")),
        ({"objective": "supervised", "data.device_cache": True}, ("data.device_cache=True",)),
        ({"objective": "supervised", "data.frames": 0}, ("data.frames=0",)),
        ({"objective": "supervised", "data.clip_scales": (1.0, 1.2)}, ("data.clip_scales",)),
    ],
)
def test_what_is_refused(fields, words, tmp_path):
    refused(lambda: pretrain.run(resolved(**{**RUN, "init": "", **fields}), tmp_path), words=words)
    assert not (tmp_path / "checkpoints").exists()


def test_an_encoder_of_images_sees_the_middle_frames(moving):
    (batch,) = take(data.train_batches(moving, data.ImageSpec(48, train=True), split="train", batch_size=16), 1)
    np.testing.assert_array_equal(batch["image"], moving.images("train")[batch["index"]])
