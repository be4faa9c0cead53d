"""`coco:` and `scenes`: what is wrong with an annotation file is refused or repaired and counted; batches as promised."""

import copy
import json
import logging
import re

import numpy as np
import pytest
from PIL import Image

from qbheat_jax import data
from qbheat_jax.data import decode
from qbheat_jax.data.sources import scenes
from qbheat_jax.errors import UserError
from tests.batches import eval_batches, train_batches

TRUTH = {
    "images": [{"id": n, "file_name": f"{n}.png", "width": 40, "height": 30} for n in (7, 3, 9)],
    "categories": [{"id": 20, "name": "cat"}, {"id": 10, "name": "dog"}],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 20, "bbox": [2, 3, 10, 12], "area": 90, "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 10, "bbox": [0, 0, 40, 30], "area": 800, "iscrowd": 1},
        {"id": 3, "image_id": 3, "category_id": 10, "bbox": [5.5, 5, 10, 10]},
    ],
}


@pytest.fixture
def made(tmp_path):
    """function(change) -> the spec of a data set whose annotations `change(truth)` has changed."""
    for n in (7, 3, 9):
        Image.new("RGB", (40, 30), (n, n, n)).save(tmp_path / f"{n}.png")

    def make(change=lambda truth: None, name="a.json"):
        truth = copy.deepcopy(TRUTH)
        change(truth)
        (tmp_path / name).write_text(json.dumps(truth))
        return f"coco:{tmp_path},{tmp_path}/{name}"

    return make


def test_images_and_boxes(made):
    source = data.open_source(f"{made()},{made(name='b.json').removeprefix('coco:')}")
    assert source.splits == {"train": 3, "val": 3} and source.class_names == ["dog", "cat"]
    assert [image["id"] for image in source.annotations("val")["images"]] == [3, 7, 9]
    boxes = source.boxes("train", 1)
    np.testing.assert_array_equal(boxes.corners, [[2, 3, 12, 15], [0, 0, 40, 30]])
    assert boxes.classes.tolist() == [1, 0] and boxes.crowd.tolist() == [False, True] and boxes.size == (30, 40)
    assert len(source.boxes("train", 2)) == 0
    # Without an area the box's own is taken; one that is given stays, since COCO's are those of outlines.
    assert [a["area"] for a in source.annotations("train")["annotations"]] == [90, 800, 100]
    assert set(sum((list(counts.values()) for counts in source.repairs.values()), [])) == {0}
    assert "2 classes of boxes" in data.describe(source)


def test_batches_have_the_boxes_of_their_images_and_crowds_are_not_trained_on(made):
    source = data.open_source(made())
    bad = data.BadFiles(0.0, 3)
    batches = eval_batches(source, split="train", batch_size=4, image_size=40, seed=0, boxes=3, bad=bad)
    batch = next(batches)
    batches.close()
    assert batch["mask"].tolist() == [True] * 3 + [False] and batch["classes"].tolist()[1] == [1, -1, -1]
    assert batch["image"][:3, 0, 0, 0].tolist() == [3, 7, 9]
    np.testing.assert_array_equal(batch["boxes"][1, 0], [2, 3, 12, 15])
    plain = eval_batches(source, split="train", batch_size=4, image_size=40, seed=0, placements=(0,))
    assert set(next(plain)) == {"image", "quarter", "label", "mask", "index"}, "they can be pre-trained on as well"
    plain.close()


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop("images"), "a.json .*images, annotations and categories"),
        (lambda t: t["annotations"][0].update(category_id=99), "box 1 of 7.png has category_id=99"),
        (lambda t: t["annotations"][0].update(image_id=99), "box 1 has image_id=99"),
        (lambda t: t["annotations"][2].update(id=1), "id 1 of annotations"),
        (lambda t: t["images"][2].update(id=7), "id 7 of images"),
        (lambda t: t["images"][0].pop("width"), "7.png, .*width"),
        (lambda t: t["annotations"][0].update(bbox=[1, 2, 3]), r"7.png has bbox=\[1, 2, 3\]"),
        (lambda t: t["annotations"][0].update(bbox=[1, 2, float("nan"), 3]), r"7.png has bbox=\[1, 2, nan, 3\]"),
        (lambda t: [image.update(file_name="x.png") for image in t["images"]], "a.json.* 3 images"),
        (lambda t: t.update(categories=[]), "a.json has no categories"),
    ],
)
def test_what_may_hide_more_is_refused(made, change, words):
    with pytest.raises(UserError, match=words) as caught:
        data.open_source(made(change))
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def test_torn_and_misnamed_files_are_refused(made, tmp_path):
    spec = made()
    (tmp_path / "a.json").write_text(json.dumps(TRUTH)[:-40])
    other = made(lambda t: t["categories"][0].update(name="cow"), "b.json").removeprefix("coco:")
    for wrong, words in (
        (spec, "a.json .*JSON"),
        (f"coco:{tmp_path},{tmp_path}/none.json", "none.json .*No such file"),
        (f"{made(name='c.json')},{other}", "b.json .*categories"),
        ("coco:images", "'coco:images'.* coco:IMAGES_DIR,ANNOTATIONS.json"),
        (f"coco:{tmp_path}/none,{tmp_path}/c.json", f"{tmp_path}/none,"),
    ):
        with pytest.raises(UserError, match=words):
            data.open_source(wrong)
    with pytest.raises(UserError, match="'synthetic' has no boxes"):
        data.open_source("synthetic").annotations("train")


def test_what_can_be_repaired_is_counted(made, caplog):
    def change(truth):
        truth["images"].append({"id": 11, "file_name": "gone.png", "width": 40, "height": 30})
        for n, (image, box) in enumerate(
            ((11, [0, 0, 9, 9]), (9, [35, 25, 20, 20]), (9, [-0.4, 0, 9, 9]), (9, [50, 0, 5, 5]), (9, [1, 1, 0, 5]))
        ):
            truth["annotations"].append({"id": 100 + n, "image_id": image, "category_id": 10, "bbox": box})

    with caplog.at_level(logging.WARNING, "qbheat"):
        source = data.open_source(made(change))
    assert list(source.repairs["train"].values()) == [1, 1, 1, 1] and source.splits["train"] == 3
    np.testing.assert_allclose(source.boxes("train", 2).corners, [[35, 25, 40, 30], [0, 0, 8.6, 9]], atol=1e-5)
    assert "1 images without a file (first: gone.png)" in caplog.text and len(caplog.records) == 4


def test_an_image_of_another_size_than_annotated_is_a_bad_file(made):
    source = data.open_source(made(lambda t: t["images"][0].update(width=30, height=40)))
    bad = data.BadFiles(0.5, 3)
    batches = eval_batches(source, split="train", batch_size=3, image_size=32, seed=0, boxes=3, bad=bad)
    assert next(batches)["mask"].tolist() == [True, False, True] and bad.count == 1
    batches.close()


def test_scenes_have_exact_boxes_of_their_own_digits():
    source = data.open_source("scenes:24")
    assert source.splits == {"train": 24, "val": 3, "test": 3} and source.class_names == [str(d) for d in range(10)]
    again, boxes, mask = scenes.scene("train", 5)
    np.testing.assert_array_equal(again, source.images("train")[5])
    np.testing.assert_array_equal(boxes.corners, data.open_source("scenes:9").boxes("train", 5).corners)
    np.testing.assert_array_equal(mask, source.masks("train", 5))
    for (left, top, right, bottom), kind in zip(boxes.corners.astype(int).tolist(), boxes.classes):
        inside = mask[top:bottom, left:right]
        assert (inside == 1 + kind).any(0)[[0, -1]].all() and (inside == 1 + kind).any(1)[[0, -1]].all(), "tight boxes"
        mask[top:bottom, left:right] = 0
    assert len(boxes) and not mask.any(), "no ink outside the boxes"
    counts = [len(source.boxes("train", n)) for n in range(24)]
    assert min(counts) == 0 and max(counts) > 2, "empty scenes and full ones"
    truth = source.annotations("train")
    assert len(truth["annotations"]) == sum(counts) and len(truth["images"]) == 24
    with pytest.raises(UserError, match="N >= 8 scenes"):
        data.open_source("scenes:3")


def test_training_batches_of_scenes_resume_where_they_stopped():
    source = data.open_source("scenes:24")
    fields = dict(split="train", batch_size=4, image_size=64, seed=1, flip=True, boxes=6, jitter=(0.7, 1.5))
    whole = train_batches(source, **fields)
    three = [next(whole) for _ in range(3)]
    resumed = next(train_batches(source, **fields, position=8))
    for name, expected in three[2].items():
        np.testing.assert_array_equal(resumed[name], expected, err_msg=name)
    shares = [next(train_batches(source, **fields, process_index=p, process_count=2)) for p in (0, 1)]
    np.testing.assert_array_equal(np.concatenate([s["boxes"] for s in shares]), three[0]["boxes"])


@pytest.mark.parametrize("kind", ["array_record", "tfrecord"])
def test_boxes_of_tensorflow_datasets(tmp_path, kind):
    """Features as tfds:coco/2017 has them: what is said in shares of the image comes as pixels, found by index alone."""
    tfds = pytest.importorskip("tensorflow_datasets")
    inner = {
        "bbox": tfds.features.BBoxFeature(), "label": tfds.features.ClassLabel(names=["cat", "dog"]), "is_crowd": np.bool_,
    }  # fmt: skip
    features = {"image": tfds.features.Image(encoding_format="png"), "objects": tfds.features.Sequence(inner)}
    own = [
        {"bbox": tfds.features.BBox(ymin=0.1, xmin=0.25, ymax=0.5, xmax=1.0), "label": "dog", "is_crowd": False},
        {"bbox": tfds.features.BBox(ymin=0.0, xmin=0.0, ymax=1.0, xmax=0.5), "label": "cat", "is_crowd": True},
    ]
    examples = [{"image": np.full((30, 40, 3), 80 * n, np.uint8), "objects": own[:n]} for n in range(3)]
    builder = tfds.dataset_builders.AdhocBuilder(
        name="boxes", version="1.0.0", features=tfds.features.FeaturesDict(features), data_dir=tmp_path, file_format=kind,
        split_datasets={split: list(enumerate(examples)) for split in ("train", "validation")},
    )  # fmt: skip
    builder.download_and_prepare()
    source = data.open_source("tfds:boxes", tfds_dir=str(tmp_path))
    assert source.boxed and source.class_names == ["cat", "dog"] and source.classes("train") is None
    if kind == "tfrecord":
        with pytest.raises(UserError, match="'tfds:boxes' .*'tfds build boxes --file_format=array_record'"):
            source.boxes("train", 0)
        return
    greys = [decode.decode(source.fetch("val", n)[0])[0, 0, 0] // 80 for n in range(3)]  # tfds shuffles what it stores
    found = {grey: source.boxes("val", n) for n, grey in enumerate(greys)}
    assert [len(found[n]) for n in range(3)] == [0, 1, 2] and all(b.size == (30, 40) for b in found.values())
    np.testing.assert_allclose(found[2].corners, [[10, 3, 40, 15], [0, 0, 20, 30]], rtol=1e-5)
    assert found[2].classes.tolist() == [1, 0] and found[2].crowd.tolist() == [False, True]
    truth = source.annotations("validation")
    assert [image["height"] for image in truth["images"]] == [30] * 3 and len(truth["annotations"]) == 3
    kept = [(greys[a["image_id"]], a["category_id"], a["iscrowd"], round(a["area"])) for a in truth["annotations"]]
    assert sorted(kept) == [(1, 1, 0, 360), (2, 0, 1, 600), (2, 1, 0, 360)]
    fields = dict(batch_size=3, image_size=32, seed=0, flip=False, boxes=4)
    batch = next(iter(train_batches(source, split="train", **fields)))
    assert batch["mask"].all() and sorted((batch["classes"] >= 0).sum(1)) == [0, 1, 1], "a crowd is not trained on"


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["annotations"][0].update(iscrowd=None),
        lambda t: t["annotations"][0].update(iscrowd=False, area=None, image_id="7", category_id=20.0),
        lambda t: t["images"][0].update(width="40", height=30.0),
        lambda t: t["images"][0].update(id=7.0),
        lambda t: t["categories"][0].update(id="20"),
        lambda t: t["annotations"][0].update(bbox=["2", 3.0, "10.0", 12]),
        lambda t: [a.pop("id") for a in t["annotations"]],
        lambda t: [a.update(id=n) for n, a in enumerate(t["annotations"])],
        lambda t: t["images"][0].update(file_name=".\\7.png"),
    ],
)
def test_values_that_can_mean_one_thing_only_are_taken_for_it(made, change):
    expected, source = data.open_source(made()), data.open_source(made(change, "b.json"))
    for index in range(3):
        ours, theirs = source.boxes("train", index), expected.boxes("train", index)
        np.testing.assert_array_equal(ours.corners, theirs.corners)
        assert (ours.classes.tolist(), ours.crowd.tolist(), ours.size) == (
            theirs.classes.tolist(), theirs.crowd.tolist(), theirs.size,
        )  # fmt: skip
        assert source.fetch("train", index)[0] == expected.fetch("train", index)[0]
    assert [a["id"] for a in source.annotations("train")["annotations"]] == [1, 2, 3]


def test_a_byte_order_mark_ids_that_are_texts_and_names_that_are_there_twice(made, tmp_path):
    def change(truth):
        for image in truth["images"]:
            image["id"] = f"image-{image['id']}"
        for annotation in truth["annotations"]:
            annotation["image_id"] = f"image-{annotation['image_id']}"
        truth["categories"].append({"id": 30, "name": "cat"})

    spec = made(change)
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.json").read_bytes())
    source = data.open_source(spec)
    assert [image["id"] for image in source.annotations("train")["images"]] == ["image-3", "image-7", "image-9"]
    assert source.class_names == ["dog", "cat (20)", "cat (30)"] and len(source.boxes("train", 1)) == 2


@pytest.mark.parametrize(
    "change, field",
    [
        (lambda t: t["images"][0].update(width=-1), "7.png, has width=-1"),
        (lambda t: t["images"][0].update(height=0), "7.png, has height=0"),
        (lambda t: t["images"][0].update(height=30.5), "7.png, has height=30.5"),
        (lambda t: t["images"][0].update(width="wide"), "7.png, has width='wide'"),
        (lambda t: t["images"][0].update(width=True), "7.png, has width=True"),
        (lambda t: t["annotations"][0].update(iscrowd=2), "box 1 of 7.png has iscrowd=2"),
        (lambda t: t["annotations"][0].update(iscrowd="yes"), "box 1 of 7.png has iscrowd='yes'"),
        (lambda t: t["annotations"][0].update(bbox=[1, True, 3, 4]), "box 1 of 7.png has bbox="),
        (lambda t: t["annotations"][0].update(bbox=None), "box 1 of 7.png has bbox=None"),
        (lambda t: t["annotations"][0].update(image_id=None), "box 1 has no image_id"),
        (lambda t: t["annotations"][0].update(category_id=[1]), "box 1 has category_id="),
        (lambda t: t["categories"][0].update(name=None), "(id 20) has no name"),
        (lambda t: t["images"][0].update(file_name=7), "(id 7) has file_name=7"),
        (lambda t: t["images"].append(None), "an entry of images has no id"),
        (lambda t: t["annotations"].append("box"), "box number 4 has no image_id"),
    ],
)
def test_values_without_a_meaning_are_refused_before_anything_is_trained(made, change, field):
    with pytest.raises(UserError) as caught:
        data.open_source(made(change))
    assert field in str(caught.value) and caught.value.exit_code == 2


def _turned_by(orientation, path, size=(40, 30)):
    """Save an image whose top left corner is red as stored, with an EXIF orientation."""
    image = Image.new("RGB", size, (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 20, 10))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif, quality=95)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("stored", [True, False])
def test_boxes_stay_on_their_pixels_whatever_exif_says(tmp_path, caplog, orientation, stored):
    """A box around the red corner: annotated for the stored image where only that has the size, else for the upright one."""
    _turned_by(orientation, tmp_path / "a.jpg")
    upright = np.asarray(decode.decode((tmp_path / "a.jpg").read_bytes()))
    image = np.asarray(Image.open(tmp_path / "a.jpg")) if stored else upright
    told = stored and orientation >= 5
    if stored and 2 <= orientation <= 4:
        pytest.skip("both ways the image has the same size: the rule takes the upright one")
    rows, columns = (np.flatnonzero((image[..., 0] > 128).any(axis)) for axis in (1, 0))
    box = [int(columns[0]), int(rows[0]), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1]
    truth = {
        "images": [{"id": 0, "file_name": "a.jpg", "width": image.shape[1], "height": image.shape[0]}],
        "categories": [{"id": 0, "name": "corner"}],
        "annotations": [{"id": 0, "image_id": 0, "category_id": 0, "bbox": box}],
    }
    (tmp_path / "a.json").write_text(json.dumps(truth))
    with caplog.at_level(logging.WARNING, "qbheat"):
        source = data.open_source(f"coco:{tmp_path},{tmp_path}/a.json")
    counts = re.search(f"boxes of {0 if told else 1} .* those of {1 if told else 0} ", caplog.text) is not None
    assert counts == (orientation > 1) and len(caplog.records) == (orientation > 1)
    batches = eval_batches(source, split="train", batch_size=1, image_size=40, seed=0, boxes=2)
    batch = next(batches)
    batches.close()
    left, top, right, bottom = (int(v) for v in batch["boxes"][0, 0])
    red = batch["image"][0, ..., 0] > 128
    seen = red & (batch["image"][0, ..., 2] < 100)
    assert batch["mask"].tolist() == [True] and seen[top:bottom, left:right].mean() > 0.9
    seen[top:bottom, left:right] = False
    assert seen.mean() < 0.02, "nothing red is outside the box"
