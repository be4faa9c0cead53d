"""Sources: what each spec string gives, and the exact words where it gives nothing."""

import importlib.util
import os
import re

import numpy as np
import pytest
from PIL import Image

from qbheat_jax import data
from qbheat_jax.data import decode
from qbheat_jax.data.sources import photos
from qbheat_jax.errors import UserError


def picture(path, value=0, size=(8, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 255 - value, 7)).save(path)
    return path


def refused(words, call, *args, **kwargs):
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


@pytest.fixture(scope="module")
def twenty():
    return data.open_source("photos")


def test_photos_counts_shapes_and_balance(twenty):
    assert twenty.splits == {"train": 2500, "val": 500, "test": 1000}
    assert len(twenty.class_names) == 20 and twenty.class_names[:2] == ["astronaut", "brick"]
    for split, n in twenty.splits.items():
        assert twenty.images(split).shape == (n, 64, 64, 3) and twenty.images(split).dtype == np.uint8
        assert twenty.labels(split).dtype == np.int32
        np.testing.assert_array_equal(twenty.labels(split), np.arange(n) % 20)
    image, label, name = twenty.fetch("validation", 43)
    np.testing.assert_array_equal(image, twenty.images("val")[43])
    assert label == 3 and "val[43]" in name
    assert data.describe(twenty) == "photos: train 2,500, val 500, test 1,000 images; 20 classes"


def test_photos_splits_share_no_pixel():
    for label, (name, *_) in enumerate(photos.PHOTOGRAPHS):
        height, width = photos.load(name).shape[:2]
        seen = {}
        for split in photos.BANDS:
            shown = np.zeros((height, width), bool)
            for top, left in zip(*photos.corners(label, height, width, split)):
                assert 0 <= top <= height - 64 and 0 <= left <= width - 64
                shown[top : top + 64, left : left + 64] = True
            seen[split] = shown
        for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
            assert not (seen[a] & seen[b]).any(), (name, a, b)
        for split, (_, begin, end) in photos.BANDS.items():
            _, _, band_height, band_width = photos.band(height, width, split)
            assert min(band_height, band_width) >= 64
            cut = band_width if width >= height else band_height
            assert abs(cut / max(height, width) - (end - begin) / 100) < 0.01


def test_photos_are_the_photographs(twenty):
    flower = photos.load("flower")
    top, left = (axis[3] for axis in photos.corners(19, *flower.shape[:2], "train"))
    np.testing.assert_array_equal(twenty.images("train")[3 * 20 + 19], flower[top : top + 64, left : left + 64])


def test_photos_positions_are_part_of_the_data_set():
    # Written down, so that no change of numpy or of this code changes the data set unnoticed.
    top, left = photos.corners(0, 512, 512, "train")
    assert (top[:3].tolist(), left[:3].tolist()) == ([372, 55, 305], [130, 51, 207])
    top, left = photos.corners(7, 303, 384, "test")
    assert (top[:3].tolist(), left[:3].tolist()) == ([110, 16, 49], [292, 310, 298])


def test_photos_crops_differ():
    corners = set(zip(*photos.corners(0, 512, 512, "train")))
    assert len(corners) == 125


def test_photos_without_a_wheel_or_a_file(monkeypatch, tmp_path):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else real(name))
    refused("pip install scikit-learn", photos.load, "china")

    class Empty:
        submodule_search_locations = [str(tmp_path)]

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: Empty)
    refused("pip install --force-reinstall scikit-image", photos.load, "astronaut")


def test_unknown_specs():
    refused("data.source='imagenet'", data.open_source, "imagenet")
    refused("data.source='coco'", data.open_source, "coco")
    refused("data.source='photos:3'", data.open_source, "photos:3")
    refused("data.source='synthetic:few'", data.open_source, "synthetic:few")
    refused("data.source='folder:'", data.open_source, "folder:")


def test_unknown_split_names_the_splits_there_are(twenty):
    refused("'train' (2500 images), 'val' (500 images)", twenty.split, "holdout")
    assert twenty.split("valid") == "val"


def test_synthetic():
    source = data.open_source("synthetic:80", image_size=16)
    assert source.splits == {"train": 80, "val": 10, "test": 10}
    image, label, _ = source.fetch("train", 13)
    assert image.shape == (16, 16, 3) and image.dtype == np.uint8 and label == 3
    np.testing.assert_array_equal(image, data.open_source("synthetic:80", image_size=16).fetch("train", 13)[0])
    assert (image != source.fetch("train", 14)[0]).any()
    np.testing.assert_array_equal(source.labels("train")[:11], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0])


def test_folder_with_splits_and_classes(tmp_path):
    for k, extension in enumerate(("jpg", "JPEG", "Png", "webp", "bmp", "gif", "tif", "TIFF")):
        picture(tmp_path / "train" / "b" / f"{k}.{extension}")
    picture(tmp_path / "train" / "a" / "deeper" / "x.png")
    picture(tmp_path / "validation" / "a" / "1.png")
    picture(tmp_path / "validation" / "b" / "2.png", value=200)
    picture(tmp_path / "train" / "a" / ".hidden.png")
    picture(tmp_path / ".cache" / "a" / "1.png")
    (tmp_path / "train" / "a" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "README").write_text("no image either")
    source = data.open_source(f"folder:{tmp_path}")
    assert source.splits == {"train": 9, "val": 2} and source.class_names == ["a", "b"]
    assert source.labels("train").tolist() == [0] + [1] * 8
    names = [os.path.relpath(source.fetch("train", k)[2], tmp_path / "train") for k in range(9)]
    assert names == [os.path.join("a", "deeper", "x.png")] + [
        os.path.join("b", f"{k}.{e}") for k, e in enumerate(("jpg", "JPEG", "Png", "webp", "bmp", "gif", "tif", "TIFF"))
    ]
    content, label, _ = source.fetch("valid", 1)
    np.testing.assert_array_equal(decode.decode(content)[0, 0], [200, 55, 7])
    assert label == 1
    source.check_labels("train", "val")
    refused("'train' (9 images), 'val' (2 images)", source.split, "test")


def test_folder_order_does_not_depend_on_the_disk(tmp_path, monkeypatch):
    for k in (5, 3, 10, 1):
        picture(tmp_path / "train" / f"class{k}" / f"{k}.png")
    expected = [data.open_source(f"folder:{tmp_path}").fetch("train", k)[2] for k in range(4)]
    real = os.scandir

    class Backwards:
        def __init__(self, path):
            self.path = path

        def __enter__(self):
            with real(self.path) as listing:
                return reversed(list(listing))

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    assert [data.open_source(f"folder:{tmp_path}").fetch("train", k)[2] for k in range(4)] == expected


def test_folder_without_labels(tmp_path):
    picture(tmp_path / "some" / "where" / "b.png")
    picture(tmp_path / "a.png")
    source = data.open_source(f"folder:{tmp_path}")
    assert source.splits == {"train": 2} and source.class_names is None
    assert source.labels("train").tolist() == [-1, -1]
    assert source.fetch("train", 0)[2].endswith("a.png")
    assert data.describe(source).endswith("train 2 images; no labels")
    refused("split 'train' of data.source='folder:", source.check_labels, "train", "train")


def test_folder_split_without_classes(tmp_path):
    picture(tmp_path / "train" / "1.png")
    picture(tmp_path / "test" / "a" / "1.png")
    source = data.open_source(f"folder:{tmp_path}")
    assert source.labels("train").tolist() == [-1]
    refused("split 'train' of data.source='folder:", source.check_labels, "train", "test")


def test_folder_links_are_followed_but_not_in_circles(tmp_path):
    picture(tmp_path / "elsewhere" / "1.png")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "root")
    assert data.open_source(f"folder:{tmp_path / 'root'}").splits == {"train": 1}


def test_folder_labels_that_differ(tmp_path):
    for name in "abc":
        picture(tmp_path / "train" / name / "1.png")
    for name in "abx":
        picture(tmp_path / "test" / name / "1.png")
    source = data.open_source(f"folder:{tmp_path}")
    assert source.labels("test").tolist() == [0, 1, -1]
    refused(
        "'train' (3) and 'test' (3): only in 'train': c; only in 'test': x",
        source.check_labels,
        "train",
        "test",
    )


def test_folder_errors(tmp_path):
    refused(f"{tmp_path / 'nowhere'} ", data.open_source, f"folder:{tmp_path / 'nowhere'}")
    refused(f"{tmp_path / 'x' / '1.png'} ", data.open_source, f"folder:{picture(tmp_path / 'x' / '1.png')}")
    (tmp_path / "bare").mkdir()
    refused(f"{tmp_path / 'bare'} ", data.open_source, f"folder:{tmp_path / 'bare'}")
    (tmp_path / "split" / "train").mkdir(parents=True)
    refused(f"{tmp_path / 'split' / 'train'} ", data.open_source, f"folder:{tmp_path / 'split'}")
    picture(tmp_path / "split" / "train" / "full" / "1.png")
    hollow = tmp_path / "split" / "train" / "hollow"
    hollow.mkdir()
    refused(f"{hollow} ", data.open_source, f"folder:{tmp_path / 'split'}")
    picture(hollow / "1.png")
    picture(tmp_path / "split" / "train" / "stray.png")
    refused("images (stray.png, ...) and folders (full, ...)", data.open_source, f"folder:{tmp_path / 'split'}")
    for name in ("val", "valid"):
        picture(tmp_path / "two" / name / "a" / "1.png")
    refused("'val', val and valid", data.open_source, f"folder:{tmp_path / 'two'}")
