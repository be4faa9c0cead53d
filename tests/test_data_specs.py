"""Data specs: batches hold what their shapes say, and N views are N crops, the first ones whatever N is."""

import jax
import numpy as np
import pytest

from qbheat_jax import data, device_mesh
from qbheat_jax.data import augment
from qbheat_jax.data.device_cache import DeviceCache
from tests.batches import spec_of, train_batches
from tests.test_data_pipeline import TRAIN, take

HOW = {"image_size": 32, "seed": 0, "flip": True}


@pytest.mark.parametrize(
    "source,asked",
    [("synthetic:64", {}), ("synthetic:64", {"views": 3}), ("photos", {"views": 3}), ("scenes:16", {"boxes": 4})],
)
def test_batches_hold_what_the_shapes_say(source, asked):
    shapes = spec_of(**HOW, **asked).shapes(8)
    opened = data.open_source(source, image_size=32)
    (batch,) = take(train_batches(opened, split="train", batch_size=8, **HOW, **asked), 1)
    assert {name: (x.shape, x.dtype) for name, x in batch.items() if name in shapes} == {
        name: (x.shape, x.dtype) for name, x in shapes.items()
    }
    assert batch.keys() - shapes.keys() <= {"index", "scale"}


def test_shapes_take_no_memory():
    (image,) = (x for name, x in spec_of(image_size=2**17, seed=0, flip=False).shapes(2**15).items() if name == "image")
    assert image.shape == (2**15, 2**17, 2**17, 3)


@pytest.mark.parametrize("source", ["photos", "synthetic:200"])
def test_the_first_views_are_those_of_fewer(source):
    opened = data.open_source(source, image_size=32)
    three, four = (take(train_batches(opened, batch_size=20, views=n, **TRAIN), 2) for n in (3, 4))
    for some, more in zip(three, four):
        assert more.keys() - some.keys() == {"image4"}
        for name in some:
            np.testing.assert_array_equal(some[name], more[name], name)
        views = [more[name] for name in ("image", "image2", "image3", "image4")]
        for n, one in enumerate(views):
            # Two of the few places that noise is moved to may be the same.
            assert all((one != other).any((1, 2, 3)).mean() > 0.9 for other in views[n + 1 :])


def test_the_device_cache_makes_any_number_of_views():
    opened = data.open_source("photos")
    settings = {**TRAIN, "batch_size": 48, "views": 3}
    cache = DeviceCache(opened, "train", device_mesh.make_mesh({"data": 1}, jax.devices()[:1]), 64, 1.0)
    (expected,), (got,) = (take(train_batches(opened, **settings, **more), 1) for more in ({}, {"cache": cache}))
    assert got.keys() == expected.keys()
    difference = np.asarray(got["image3"]).astype(int) - expected["image3"]
    assert np.abs(difference).max() <= 8 and (difference == 0).mean() > 0.95


def crops_of(local=2):
    how = {
        "image_size": 32,
        "seed": 0,
        "train": True,
        "crop_scale": (0.5, 1.0),
        "crop_ratio": (0.75, 4 / 3),
        "flip": True,
    }
    return data.CropsSpec(**how, views=2, local_crops=local, local_size=16, local_scale=(0.1, 0.4))


@pytest.mark.parametrize("source", ["photos", "synthetic:64"])
def test_crops_of_two_sizes(source):
    """Small crops follow the views, which stay those of `ViewsSpec`; each is where its own draws put it."""
    opened, spec = data.open_source(source, image_size=32), crops_of()
    assert spec.images == ("image", "image2", "image3", "image4") and spec.evaluation().images == ("image",)
    shapes = {name: x.shape for name, x in spec.shapes(8).items() if name.startswith("image")}
    assert shapes == {n: (8, s, s, 3) for n, s in zip(spec.images, (32, 32, 16, 16))}
    (batch,), (two,) = (
        take(data.train_batches(opened, s, split="train", batch_size=8), 1) for s in (spec, crops_of(local=0))
    )
    assert {name: batch[name].shape for name in shapes} == shapes
    for name in ("image", "image2"):
        np.testing.assert_array_equal(batch[name], two[name])
    if source == "photos":
        pixels = np.asarray(opened.fetch("train", int(batch["index"][0]))[0])
        box = spec.box(0, int(batch["index"][0]), *pixels.shape[:2], view=2)
        assert box[2] * box[3] < 0.45 * pixels.shape[0] * pixels.shape[1]
        mirrored = bool(spec.mirrored(0, int(batch["index"][0]), 2))
        np.testing.assert_array_equal(batch["image3"][0], augment.crop_resize(pixels, box, 16, mirrored))


def test_the_device_cache_makes_crops_of_two_sizes():
    opened, spec = data.open_source("photos"), crops_of()
    cache = DeviceCache(opened, "train", device_mesh.make_mesh({"data": 1}, jax.devices()[:1]), 64, 1.0)
    (expected,), (got,) = (
        take(data.train_batches(opened, spec, split="train", batch_size=48, **more), 1)
        for more in ({}, {"cache": cache})
    )
    assert got.keys() == expected.keys() and got["image4"].shape == (48, 16, 16, 3)
    difference = np.asarray(got["image4"]).astype(int) - expected["image4"]
    assert np.abs(difference).max() <= 8 and (difference == 0).mean() > 0.95


def test_only_the_first_view_is_evaluated():
    spec = spec_of(**HOW, views=3, placements=(4,))
    shown = spec.evaluation()
    assert spec.images == ("image", "image2", "image3") and shown.images == ("image",)
    assert (
        shown.placements == (4,) and not shown.train and shown.shapes(2).keys() == {"image", "quarter", "label", "mask"}
    )
