"""The device cache: the same stream as the tf.data pipeline's, on any mesh and in any process, and what it refuses."""

import json
import logging
import os
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from qbheat_jax import config as config_lib
from qbheat_jax import data, device_mesh
from qbheat_jax.data import device_cache
from qbheat_jax.data.device_cache import DeviceCache
from qbheat_jax.data.sources import photos
from qbheat_jax.data.specs.image import MEAN_GREY
from qbheat_jax.errors import UserError
from qbheat_jax.probe import encoders
from qbheat_jax.probe.encode import Encoding
from qbheat_jax.probe.fields import PROBE
from tests.batches import eval_batches, train_batches
from tests.conftest import QUICKLY
from tests.test_cli import BLOCKED, CONFIGS, ROOT
from tests.test_data_pipeline import EVAL, KEYS, TRAIN, bag, joined, take


def mesh(data=1, fsdp=1):
    return device_mesh.make_mesh({"data": data, "fsdp": fsdp}, jax.devices()[: data * fsdp])


def cached(source, split="train", on=None, size=64, gib=1.0):
    return DeviceCache(source, split, on or mesh(), size, gib)


def host(batches):
    return [{key: np.asarray(value) for key, value in batch.items()} for batch in batches]


def equal(a, b, keys=KEYS):
    assert len(a) == len(b) > 0
    for one, other in zip(a, b):
        for key in keys:
            assert one[key].dtype == other[key].dtype, key
            np.testing.assert_array_equal(one[key], other[key], key)


def close(a, b, most, share_equal):
    """Every field the same; images within `most` grey levels, and the same in that share of the numbers."""
    equal(a, b, KEYS - {"image"})
    a, b = joined(a, "image").astype(int), joined(b, "image").astype(int)
    assert a.shape == b.shape and np.abs(a - b).max() <= most and (a == b).mean() >= share_equal


@pytest.fixture(scope="module")
def twenty():
    return data.open_source("photos")


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A folder of 45 photographs of many sizes, no longer than 90 pixels, in two classes."""
    root = tmp_path_factory.mktemp("few")
    sides = np.random.default_rng(0).integers(30, 91, (45, 2))
    for k, (height, width) in enumerate(sides):
        folder = root / "train" / "ab"[k % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photos.load("coffee")[k : k + height, 3 * k : 3 * k + width]).save(folder / f"{k:02}.png")
    return data.open_source(f"folder:{root}")


@pytest.mark.parametrize("size", [32, 64])
def test_photos_are_those_of_the_tf_data_pipeline(twenty, size):
    settings = {**TRAIN, "image_size": size, "batch_size": 48, "position": 2400}  # over an epoch's end
    expected = take(train_batches(twenty, **settings), 3)
    got = host(take(train_batches(twenty, cache=cached(twenty), **settings), 3))
    assert joined(got, "mask").all() and len(set(joined(got, "quarter"))) == 5
    close(got, expected, most=8, share_equal=0.97)  # the rounding between the passes, see `resample`


def test_two_views_are_those_of_the_tf_data_pipeline(twenty):
    """MoCo's: a second crop of each image by its own draws; the first is the same with and without it."""
    settings = {**TRAIN, "batch_size": 48, "views": 2}
    expected = take(train_batches(twenty, **settings), 2)
    got = host(take(train_batches(twenty, cache=cached(twenty, on=mesh(8)), **settings), 2))
    close(got, expected, most=8, share_equal=0.97)
    second = [[{**batch, "image": batch["image2"]} for batch in batches] for batches in (got, expected)]
    close(*second, most=8, share_equal=0.95)
    assert (joined(got, "image") != joined(got, "image2")).any((1, 2, 3)).all()


def test_a_folder_of_many_sizes_is_that_of_the_tf_data_pipeline(few):
    cache = cached(few, on=mesh(8), size=90)
    expected = take(train_batches(few, batch_size=8, **TRAIN), 12)
    close(host(take(train_batches(few, batch_size=8, cache=cache, **TRAIN), 12)), expected, 8, 0.97)
    expected = list(eval_batches(few, split="train", batch_size=16, **EVAL))
    got = host(eval_batches(few, split="train", batch_size=16, cache=cache, **EVAL))
    close(got, expected, most=1, share_equal=0.99)
    assert joined(got, "mask").tolist() == [True] * 45 + [False] * 3
    assert (got[-1]["image"][-3:] == MEAN_GREY).all() and (got[-1]["index"][-3:] == -1).all()


@pytest.mark.parametrize("size,most", [(128, 2.5), (256, 0.5)])
def test_larger_images_are_squeezed_and_show_the_same_parts(tmp_path, size, most):
    """Text and edges; the less they are squeezed, the nearer they are."""
    (tmp_path / "train").mkdir()
    for k, box in enumerate(((0, 0, 500, 250), (50, 60, 260, 390), (100, 0, 400, 300), (0, 0, 600, 400))):
        Image.fromarray(photos.load("coffee")).crop(box).save(tmp_path / "train" / f"{k}.png")
    source, evaluation = data.open_source(f"folder:{tmp_path}"), {**EVAL, "image_size": 64, "split": "train"}
    cache, training = cached(source, size=size), {**TRAIN, "image_size": 64}
    got = host(take(train_batches(source, batch_size=4, cache=cache, **training), 6))
    got += host(eval_batches(source, batch_size=4, cache=cache, **evaluation))
    expected = take(train_batches(source, batch_size=4, **training), 6)
    expected += list(eval_batches(source, batch_size=4, **evaluation))
    equal(got, expected, KEYS - {"image"})
    got, expected = joined(got, "image").astype(int), joined(expected, "image")
    assert np.abs(got - expected).mean((1, 2, 3)).max() < most
    assert np.abs(got - expected[:, :, ::-1]).mean((1, 2, 3)).min() > 10, "what another crop would be"


@pytest.mark.parametrize("axes", [(8, 1), (2, 4), (1, 8)])
def test_one_device_and_eight_give_the_same_bits(few, axes):
    alone, shared = cached(few, size=50), cached(few, on=mesh(*axes), size=50)
    settings = {**TRAIN, "batch_size": 16}
    iterator = train_batches(few, cache=shared, **settings)
    batch = next(iterator)
    assert batch.keys() == KEYS
    for key, value in batch.items():
        assert value.sharding.is_equivalent_to(jax.NamedSharding(shared.mesh, device_mesh.BATCH), value.ndim), key
    # 45 images on 8 devices: six each, and none holds them all.
    assert {shard.data.shape for shard in shared._images.addressable_shards} == {(6, 15, 128)}
    equal(host([batch, *take(iterator, 4)]), host(take(train_batches(few, cache=alone, **settings), 5)))


def test_images_sent_a_few_at_a_time_are_the_same(few, monkeypatch):
    settings = {**TRAIN, "batch_size": 40}
    (expected,) = host(take(train_batches(few, cache=cached(few, size=50), **settings), 1))
    monkeypatch.setattr(device_cache, "_TRANSIT", 4 * 8 * 7680)  # four at a time of the five of each device: one
    jax.clear_caches()
    (got,) = host(take(train_batches(few, cache=cached(few, on=mesh(8), size=50), **settings), 1))
    equal([got], [expected])


def test_resuming_from_any_position_equals_the_uninterrupted_stream(few):
    whole = host(take(train_batches(few, batch_size=1, cache=cached(few, size=50), **TRAIN), 61))
    cache = cached(few, size=50)
    for position in (8, 13, 44):
        iterator = train_batches(few, batch_size=8, position=position, cache=cache, **TRAIN)
        assert iterator.position == position
        resumed = host([next(iterator), next(iterator)])
        assert iterator.position == position + 16
        for key in KEYS:
            expected = joined(whole[position : position + 16], key)
            np.testing.assert_array_equal(joined(resumed, key), expected, key)


def test_synthetic_is_not_augmented_here_either():
    source = data.open_source("synthetic:80", image_size=32)
    settings = {**TRAIN, "batch_size": 16}
    got = host(take(train_batches(source, cache=cached(source, on=mesh(8)), **settings), 6))
    equal(got, take(train_batches(source, **settings), 6))


def test_bad_files_are_masked_counted_once_and_named_in_the_log(tmp_path, caplog):
    source = bag(tmp_path, bad=3)
    bad, cache = data.BadFiles(0.1, 43), cached(source, on=mesh(8))
    with caplog.at_level(logging.WARNING, "qbheat"):
        got = host(take(train_batches(source, batch_size=40, bad=bad, cache=cache, **TRAIN), 3))
    names = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert bad.count == 3
    assert sorted(re.search(r"bad\d\.jpg", name)[0] for name in names) == ["bad0.jpg", "bad1.jpg", "bad2.jpg"]
    expected = take(train_batches(source, batch_size=40, bad=data.BadFiles(0.1, 43), **TRAIN), 3)
    close(got, expected, most=1, share_equal=0.99)
    assert 0 < (~joined(got, "mask")).sum() and (joined(got, "image")[~joined(got, "mask")] == MEAN_GREY).all()
    with pytest.raises(UserError, match=r"3 of 43 images .* cannot be decoded, more than data.max_bad_fraction=0.05"):
        next(train_batches(source, batch_size=40, bad=data.BadFiles(0.05, 43), cache=cached(source), **TRAIN))


def test_what_does_not_fit_is_refused_with_sizes(twenty):
    words = (
        "2500 images of photos train .*0.0286 GiB at 64 x 64 pixels.* data.cache_gib=0.01.* data.cache_size below 64"
    )
    with pytest.raises(UserError, match=words) as caught:
        next(train_batches(twenty, batch_size=8, cache=cached(twenty, gib=0.01), **TRAIN))
    assert caught.value.exit_code == 2
    # An eighth of it fits.
    next(train_batches(twenty, batch_size=8, cache=cached(twenty, on=mesh(8), gib=0.01), **TRAIN))


def test_a_cache_is_made_where_the_config_asks_for_it(small_config, twenty):
    def make(fields):
        return device_cache.of(small_config(fields).data, 224, twenty, "val", mesh())

    assert make({}) is None
    made = make({"data.device_cache": True, "data.cache_gib": 2.0})
    assert (made.split, made.cache_size, made.cache_gib) == ("val", 448, 2.0)
    assert make({"data.device_cache": True, "data.cache_size": 300}).cache_size == 300


def test_tfds_that_is_read_in_order_is_cached_too():
    tfds = pytest.importorskip("tensorflow_datasets")
    with tfds.testing.mock_data(num_examples=12):
        source = data.open_source("tfds:cifar10")
        assert not source.random_access
        cache = cached(source, on=mesh(2))
        got = host(eval_batches(source, split="train", batch_size=8, cache=cache, **EVAL))
        equal(got, list(eval_batches(source, split="train", batch_size=8, **EVAL)))
        batches = host(take(train_batches(source, batch_size=4, cache=cache, **TRAIN), 3))
    assert sorted(joined(batches, "index")) == list(range(12)) and joined(batches, "image").std() > 20


# --- Whole runs -----------------------------------------------------------------------------------------------------


def test_a_probe_encodes_from_the_cache(few):
    def encode(device_cache):
        fields = {"data.device_cache": device_cache, "data.source": few.spec, "batch_size": 13, "image_size": 32}
        config = config_lib.resolve(fields, PROBE)
        frozen = encoders.open_init("pixels", config)
        parts = list(Encoding(frozen, config, None, 45).batches(few, "train"))
        return [np.concatenate(column) for column in zip(*parts)][:2]

    (got, labels), (expected, expected_labels) = encode(True), encode(False)
    np.testing.assert_array_equal(labels, expected_labels)
    assert got.shape == expected.shape == (45, expected.shape[1]) and np.abs(got - expected).mean() < 0.01


# On one device, whose programs are compiled sooner than eight's.
ALONE = BLOCKED.replace(
    "from tests import conftest",
    "from tests import conftest\nimport jax\none = jax.devices()[:1]\njax.devices = lambda: one",
)


def test_photos_are_trained_on_without_tensorflow(tmp_path):
    short = {
        "data.device_cache": True, "total_steps": 2, "warmup_percent": 0, "image_size": 32, "encoder.name": "pebble",
        "decoder.width": 16, "decoder.heads": 2, "decoder.depth": 0, "log_every": 1,
    }  # fmt: skip
    fields = [part for key, value in short.items() for part in (f"--config.{key}", value)]
    command = [
        sys.executable,
        "-c",
        ALONE,
        "pretrain",
        "--config",
        CONFIGS / "photos.py",
        "--workdir",
        tmp_path,
        *fields,
    ]
    environment = os.environ | {"XLA_FLAGS": QUICKLY}
    got = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert got.returncode == 0 and "Traceback" not in got.stderr, got.stderr
    summary = json.loads(got.stdout)
    assert summary["step"] == 2 and np.isfinite(summary["val/loss"]) and summary["skipped_files"] == 0
    assert "2500 images of photos train cached: 64 x 64" in got.stderr
    assert "500 images of photos val cached: 64 x 64" in got.stderr


def test_tfds_without_tensorflow_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "qbheat_jax.data.sources.tfds_boxes", None)
    with pytest.raises(UserError, match="data.source='tfds:cifar10' is read by tensorflow, which is missing"):
        data.open_source("tfds:cifar10")


TWO = """
import logging
import sys
from tests import conftest
import jax
logging.basicConfig(stream=sys.stderr, level=logging.INFO)
process, port = int(sys.argv[1]), sys.argv[2]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, process)
import numpy as np
from qbheat_jax import data, device_mesh
from qbheat_jax.data.device_cache import DeviceCache
from tests.batches import eval_batches, train_batches
from tests.test_data_pipeline import TRAIN
source = data.open_source(sys.argv[3])
cache = DeviceCache(source, "train", device_mesh.make_mesh({"data": -1, "fsdp": 1}), 50, 1.0)
bad = data.BadFiles(0.1, cache.n)
batches = train_batches(
    source, batch_size=32, cache=cache, bad=bad, process_index=process, process_count=2, **TRAIN
)
for k, batch in zip(range(2), batches):
    rows = {}
    for name, value in batch.items():
        shards = sorted(value.addressable_shards, key=lambda shard: shard.index[0].start)
        rows[name] = np.concatenate([np.asarray(shard.data) for shard in shards])
    np.savez(f"{sys.argv[4]}/{process}-{k}.npz", **rows)
print(len(bad.names))
"""


@pytest.mark.slow
def test_two_processes_decode_a_half_each_and_make_the_same_batches(tmp_path):
    source = bag(tmp_path / "bag", bad=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    running = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, str(k), port, source.spec, str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        )
        for k in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    assert [out.split()[-1] for out, _ in outputs] == ["2", "2"], "both know of both bad files"
    # 42 images on 16 devices: three each.
    assert ["decoding 24 of 42" in outputs[0][1], "decoding 18 of 42" in outputs[1][1]] == [True, True]
    expected = host(take(train_batches(source, batch_size=32, cache=cached(source, size=50), **TRAIN), 2))
    for k, batch in enumerate(expected):
        halves = [np.load(tmp_path / f"{process}-{k}.npz") for process in range(2)]
        for key in KEYS:
            np.testing.assert_array_equal(np.concatenate([half[key] for half in halves]), batch[key], key)
