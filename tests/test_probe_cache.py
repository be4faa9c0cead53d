"""Caches of features: reused when they match, made anew when anything differs, torn ones never taken for whole."""

import dataclasses
import json
import os
import socket

import numpy as np
import pytest

from qbheat_jax import data
from qbheat_jax.errors import UserError
from qbheat_jax.probe import cache, encode, encoders, features
from qbheat_jax.probe.features import Features
from qbheat_jax.tasks import probe
from tests.probe_data import Blobs, config, tiny

ABOUT = {"split": "train", "weights": "abc"}


def made(n=10, missing=(), seen=None):
    """A function that yields n examples of shape [3], in parts, less the missing ones."""

    def make():
        if seen is not None:
            seen.append(1)
        for begin in range(0, n, 4):
            index = np.array([i for i in range(begin, min(n, begin + 4)) if i not in missing])
            yield (index[:, None] * np.ones(3)).astype(np.float32), (index % 2).astype(np.int32), index

    return make


def get(store, about=ABOUT, make=None, in_memory=False, gib=1.0):
    return store.get(about, 10, (3,), make or made(), in_memory=in_memory, cache_gib=gib)


@pytest.mark.parametrize("in_memory", [True, False])
def test_features_are_made_once(tmp_path, in_memory):
    store, seen = cache.FeatureCache(tmp_path), []
    first, index, encoded = get(store, make=made(missing=(2, 7), seen=seen), in_memory=in_memory)
    assert encoded and first.in_memory == in_memory
    again, _, encoded = get(store, make=made(seen=seen), in_memory=in_memory)
    assert not encoded and len(seen) == 1
    kept = [0, 1, 3, 4, 5, 6, 8, 9]
    np.testing.assert_array_equal(index, kept)
    for found in (first, again):
        np.testing.assert_array_equal(found.take(np.arange(8))[:, 0], kept)
        np.testing.assert_array_equal(found.labels, np.array(kept) % 2)


def test_files_outlive_the_process_and_are_of_one_thing_alone(tmp_path):
    get(cache.FeatureCache(tmp_path))
    assert get(cache.FeatureCache(tmp_path))[2] is False
    for other in ({"weights": "abd"}, {"split": "test"}, {"step": 3}):
        assert get(cache.FeatureCache(tmp_path), ABOUT | other)[2] is True
    assert not any(str(path.name).startswith(".") for path in tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["about", "labels", "features", "short"])
def test_a_damaged_cache_is_made_anew(tmp_path, damage):
    get(cache.FeatureCache(tmp_path))
    place = next(tmp_path.iterdir())
    if damage == "short":
        content = (place / "features.npy").read_bytes()
        (place / "features.npy").write_bytes(content[:-5])
    elif damage == "about":
        (place / "about.json").write_text(json.dumps(ABOUT | {"weights": "of another"}))
    else:
        (place / f"{damage}.npy").unlink()
    found, _, encoded = get(cache.FeatureCache(tmp_path))
    assert encoded
    np.testing.assert_array_equal(found.take(np.arange(10))[:, 1], np.arange(10))


def test_a_killed_run_leaves_nothing_that_is_taken_for_a_cache(tmp_path, monkeypatch):
    def killed():
        yield np.zeros((4, 3), np.float32), np.zeros(4, np.int32), np.arange(4)
        raise KeyboardInterrupt

    # As after kill -9: nothing is cleaned up on the way out.
    with monkeypatch.context() as patch:
        patch.setattr(cache.shutil, "rmtree", lambda *a, **k: None)
        with pytest.raises(KeyboardInterrupt):
            get(cache.FeatureCache(tmp_path), make=killed)
    left = list(tmp_path.iterdir())
    assert len(left) == 1 and left[0].name.endswith(".part")
    dead = left[0].with_name(left[0].name.replace(f".{os.getpid()}.", ".999999999."))
    left[0].rename(dead)
    elsewhere = tmp_path / dead.name.replace(socket.gethostname(), "another-machine")
    elsewhere.mkdir()
    assert get(cache.FeatureCache(tmp_path))[2] is True
    assert not dead.exists() and elsewhere.exists()


def test_memory_holds_what_was_used_last(tmp_path):
    store, seen = cache.FeatureCache(tmp_path), []
    two = 2 * 10 * 3 * 4 / 2**30
    for name in ("a", "b", "a", "c", "a", "b"):
        get(store, ABOUT | {"weights": name}, made(seen=seen), True, two)
    assert len(seen) == 4  # b was dropped for c


def test_files_that_cannot_be(tmp_path):
    with pytest.raises(UserError, match="cannot be mapped in gs://bucket"):
        get(cache.FeatureCache("gs://bucket"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written") as caught:
        get(cache.FeatureCache(tmp_path / "file"))
    assert caught.value.exit_code == 1


def test_the_fingerprint_is_of_all_that_features_depend_on(tmp_path):
    """Anything that changes features makes a cache of its own; what is the head's affair does not."""
    seen = []

    class ImageSummaries(cache.FeatureCache):
        def get(self, about, *args, **more):
            seen.append(json.dumps(about, sort_keys=True))
            return super().get(about, *args, **more)

    def fingerprint(frozen=None, source=None, split="train", **fields):
        encode.Encoding(frozen or tiny(), config(**fields), ImageSummaries(tmp_path), 200)(source or Blobs(), split)
        return seen[-1]

    plain = fingerprint()
    other_weights = tiny(seed=1)
    assert plain == fingerprint(learning_rates=(9.0,), seed=5, batch_size=7, protocol="knn", standardise=False)
    others = [
        fingerprint(other_weights),
        fingerprint(dataclasses.replace(tiny(), spec=data.ImageSpec(16))),
        fingerprint(dataclasses.replace(tiny(), description={"encoder": "tiny", "step": 3})),
        fingerprint(source=Blobs((("train", 60), ("test", 9)))),
        fingerprint(split="test"),
        fingerprint(protocol="tran-1"),
        fingerprint(protocol="tran-1", head__pool=2),
        fingerprint(dtype="bfloat16"),
    ]
    assert len({plain, *others}) == 9


@pytest.mark.parametrize("fields", [{}, {"protocol": "tran-1"}, {"protocol": "knn"}, {"optimizer": "ridge"}])
def test_a_probe_from_files_gives_the_number_of_one_from_memory(monkeypatch, tmp_path, fields):
    monkeypatch.setattr(data, "open_source", lambda *a, **k: Blobs())
    monkeypatch.setattr(encoders, "open_init", lambda *a: tiny())
    monkeypatch.setattr(features, "_BLOCK", 16 * 5 * 64)  # several blocks, even of so few
    fields = {"total_epochs": 2, "weight_decays": (0.1,), "learning_rates": (0.1,), **fields}
    memory = probe.run(config(**fields), tmp_path / "memory", "tiny")
    files = probe.run(config(cache_gib=1e-9, **fields), tmp_path / "files", "tiny")
    assert len(list((tmp_path / "files" / "features").glob("*/features.npy"))) == 3
    assert not (tmp_path / "memory" / "features").exists()
    same = ("top1", "top5", "holdout_top1", "hparams", "n")
    assert {key: files[key] for key in same} == {key: memory[key] for key in same}
    if fields.get("protocol") == "knn":
        again = probe.run(config(cache_gib=1e-9, **fields), tmp_path / "files", "tiny")
        assert again["encode_images_per_second"] == {} and again["top1"] == files["top1"]


def test_the_mean_over_cells_is_not_encoded_where_the_cells_are_kept(tmp_path):
    store, frozen, source = cache.FeatureCache(tmp_path), tiny(), Blobs()
    plain, index = encode.Encoding(frozen, config(), cache.FeatureCache(tmp_path), 200)(source, "test")
    encode.Encoding(frozen, config(protocol="tran-1", head__pool=2), store, 200)(source, "test")
    encoding = encode.Encoding(frozen, config(), store, 200)
    encoding.mapped = None  # nothing is encoded
    means, kept = encoding(source, "test")
    np.testing.assert_array_equal(kept, index)
    np.testing.assert_array_equal(means.labels, plain.labels)
    np.testing.assert_allclose(means.take(index), plain.take(index), atol=1e-6)
    assert encoding.rates == {}
    other = encode.Encoding(tiny(seed=1), config(), store, 200)  # whose cells are not kept
    assert abs(other(source, "test")[0].take(index) - plain.take(index)).max() > 0.01 and "test" in other.rates


def test_cells_that_cannot_be_pooled_so(tmp_path):
    with pytest.raises(UserError, match=r"head.pool=3 is not accepted: it takes a divisor of the map's 4 x 4 cells"):
        encode.Encoding(tiny(), config(protocol="tran-1", head__pool=3), cache.FeatureCache(tmp_path), 200)


def test_blocks_of_joined_files_are_taken_in_order(tmp_path):
    x = np.arange(24, dtype=np.float32).reshape(12, 2)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    both = Features.of(mapped, np.arange(12)).subset(np.array([5, 3])).joined(Features.of(x + 100, np.arange(12)))
    assert len(both) == 14 and not both.in_memory
    np.testing.assert_array_equal(both.take(np.array([1, 2, 0]))[:, 0], [6, 100, 10])
    np.testing.assert_array_equal(both.labels[:3], [5, 3, 0])
    whole = np.concatenate([part for _, part in both.blocks(5)])
    np.testing.assert_array_equal(whole, both.take(np.arange(14)))
