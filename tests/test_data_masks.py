"""Images with masks: both layouts, the names of classes, how numbers are stored, and what is left out or refused."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from qbheat_jax import data
from qbheat_jax.data import decode, palette
from qbheat_jax.data.sources.masks import VOC
from qbheat_jax.data.specs import image as image_lib
from qbheat_jax.data.specs.masks import IGNORED, MasksSpec
from qbheat_jax.errors import RUN_FAILED, UserError
from qbheat_jax.tools import doctor

SIZE = (8, 12)


def save(path, array, palette_of=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(array)
    if palette_of is not None:
        picture.putpalette(palette_of)
    picture.save(path)


def photograph(seed, size=SIZE):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)


def mask(seed, size=SIZE, classes=3):
    return np.random.default_rng(seed).integers(0, classes, size).astype(np.uint8)


def voc(root, names=(("train", "abc"), ("val", "de")), bare=""):
    """VOC's layout with palette PNGs. The images in `bare` have no mask."""
    for seed, name in enumerate("".join(names for _, names in names)):
        save(root / "JPEGImages" / f"{name}.jpg", photograph(seed))
        if name not in bare:
            save(root / "SegmentationClass" / f"{name}.png", mask(seed), palette.colours().tobytes())
    for split, listed in names:
        lists = root / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{split}.txt").write_text("\n".join(listed) + "\n")


def ade(root, splits=(("training", 3), ("validation", 2)), folder="annotations"):
    """ADE20K's layout, with masks in grey and without names of classes."""
    for split, count in splits:
        for n in range(count):
            save(root / "images" / split / f"{n}.jpg", photograph(n))
            save(root / folder / split / f"{n}.png", mask(n))


def opened(root):
    return data.open_source(f"masks:{root}")


def grey_png(array, bits):
    """A grey PNG of 1, 2, 4, 8 or 16 bits a pixel, written by hand: Pillow has no grey of 2 and 4 bits."""
    height, width = array.shape
    spread = (array[..., None] >> np.arange(bits)[::-1]) & 1
    rows = np.packbits(spread.reshape(height, -1).astype(np.uint8), axis=1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_grey_pngs_hold_their_numbers(bits):
    numbers = np.random.default_rng(bits).integers(0, 2**bits, (5, 7))
    numbers[0, :2] = 0, 2**bits - 1
    np.testing.assert_array_equal(decode.decode_numbers(grey_png(numbers, bits)), numbers)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palette_pngs_hold_their_numbers(tmp_path, bits):
    numbers = mask(bits, classes=2**bits)
    picture = Image.fromarray(numbers)
    picture.putpalette(palette.colours()[::-1].tobytes())
    picture.save(tmp_path / "a.png", bits=bits, transparency=0)
    np.testing.assert_array_equal(decode.decode_numbers((tmp_path / "a.png").read_bytes()), numbers)
    np.testing.assert_array_equal(decode.decode_numbers(palette.png(numbers)), numbers)


def test_voc(tmp_path):
    voc(tmp_path, (("train", "abc"), ("val", "de"), ("test", "fg")), bare="bfg")
    source = opened(tmp_path)
    assert source.splits == {"train": 2, "val": 2} and source.mask_names == VOC and len(VOC) == 21
    assert source.class_names is None and (source.labels("val") == -1).all()
    np.testing.assert_array_equal(source.masks("train", 1), mask(2))
    content, label, name = source.fetch("train", 1)
    assert label == -1 and name.endswith("c.jpg") and decode.decode(content).shape == (*SIZE, 3)
    assert ["1 images" in source.notes[0], "2 images" in source.notes[1]] == [True, True] and "b.jpg" in source.notes[0]
    assert "21 classes of pixels" in data.describe(source)


def test_doctor_reads_the_masks_of_a_sample(tmp_path):
    voc(tmp_path)
    save(tmp_path / "SegmentationClass" / "b.png", bad_mask("value"))
    report = doctor.describe_data(f"masks:{tmp_path}")
    assert "train: 2 of 3 images" in report and "val: 2 of 2 images" in report
    assert str(tmp_path / "SegmentationClass" / "b.png") in report and "37" in report


def test_ade20k_has_no_background(tmp_path):
    ade(tmp_path)
    rows = ["Idx\tRatio\tTrain\tVal\tStuff\tName", "1\t0.1\t9\t9\t1\twall", "2\t0.1\t9\t9\t1\tbuilding, edifice"]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(rows) + "\n")
    source = opened(tmp_path)
    assert source.splits == {"train": 3, "val": 2} and source.mask_names == ["wall", "building"]
    stored = mask(1)
    np.testing.assert_array_equal(source.masks("train", 1), np.array([IGNORED, 0, 1])[stored])


def test_values_of_empty_lines_do_not_count(tmp_path):
    ade(tmp_path, folder="labels")
    (tmp_path / "classes.txt").write_text("sky\n\nsea\n")
    (tmp_path / "labels" / "training" / "0.png").write_bytes(grey_png(np.full(SIZE, 65535), 16))
    source = opened(tmp_path)
    assert source.mask_names == ["sky", "sea"]
    np.testing.assert_array_equal(source.masks("train", 1), np.array([0, IGNORED, 1])[mask(1)])
    assert (source.masks("train", 0) == IGNORED).all()


def test_identity_follows_the_masks(tmp_path):
    ade(tmp_path)
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    first = opened(tmp_path).identity("train")
    assert opened(tmp_path).identity("train") == first
    save(tmp_path / "annotations" / "training" / "0.png", mask(0, (9, 9)))
    assert opened(tmp_path).identity("train") != first


def bad_mask(kind):
    if kind == "RGB":
        return photograph(0)
    return np.full(SIZE, 37, np.uint8) if kind == "value" else mask(0, (8, 11))


@pytest.mark.parametrize("kind", ["RGB", "value", "size", "torn", "gone", "jpeg"])
def test_bad_masks_are_bad_files(tmp_path, kind):
    voc(tmp_path)
    path = tmp_path / "SegmentationClass" / "b.png"
    source, spec = opened(tmp_path), MasksSpec(16)
    if kind == "gone":
        path.unlink()
    elif kind == "torn":
        path.write_bytes(path.read_bytes()[:-45])
    elif kind == "jpeg":
        path.write_bytes((tmp_path / "JPEGImages" / "b.jpg").read_bytes())
    else:
        save(path, bad_mask(kind))
    bad = data.BadFiles(0.1, 3)
    got = image_lib.build(spec, lambda _, n: spec.fetch(source, "train", n), np.zeros(3, int), np.arange(3), bad)
    assert got["mask"].tolist() == [True, False, True] and (got["target"][1] == IGNORED).all()
    assert bad.names == (str(tmp_path / ("JPEGImages/b.jpg" if kind == "size" else "SegmentationClass/b.png")),)
    with pytest.raises(UserError) as caught:
        bad.check()
    assert caught.value.exit_code == RUN_FAILED and "\n" not in str(caught.value)


def test_the_pipeline_brings_images_and_masks_in_order(tmp_path):
    voc(tmp_path)
    save(tmp_path / "SegmentationClass" / "b.png", bad_mask("size"))
    source, bad = opened(tmp_path), data.BadFiles(1.0, 3)
    batches = data.eval_batches(source, MasksSpec(12), split="train", batch_size=2, workers=1, bad=bad)
    got = [np.concatenate(parts) for parts in zip(*([b["target"], b["mask"][:, None]] for b in batches))]
    assert got[1][:, 0].tolist() == [True, False, True, False] and bad.count == 1
    for row, seed in ((0, 0), (2, 2)):
        np.testing.assert_array_equal(got[0][row, :8], mask(seed))
        assert (got[0][row, 8:] == IGNORED).all()


def spoil(root, what):
    """Makes a folder that cannot be opened, and returns what the error has to name."""
    if what == "nothing":
        return "images/"
    if what == "no folder":
        return "none"
    if what == "bare":
        voc(root, bare="de")
        return "val has 2 images without a mask"
    if what == "lists":
        voc(root)
        for path in (root / "ImageSets" / "Segmentation").iterdir():
            path.unlink()
        return "train.txt"
    if what == "split twice":
        ade(root, (("train", 1), ("training", 1)))
        return "'train'"
    if what == "no split":
        ade(root, (("dev", 1),))
        return "training and validation"
    if what == "stem twice":
        ade(root)
        save(root / "images" / "training" / "0.png", photograph(0))
        return "two images 0"
    ade(root)
    if what == "names":
        return "classes.txt"
    text = {"twice": "a\nb\na\n", "many": "\n".join(map(str, range(256))), "empty": "\n\n"}[what]
    (root / "classes.txt").write_text(text)
    return {"twice": "'a'", "many": "256 classes", "empty": "0 classes"}[what]


@pytest.mark.parametrize(
    "what",
    "nothing,no folder,bare,lists,split twice,no split,stem twice,names,twice,many,empty".split(","),
)
def test_what_cannot_be_opened_is_one_sentence(tmp_path, what):
    named = spoil(tmp_path, what)
    spec = f"masks:{tmp_path / 'none' if what == 'no folder' else tmp_path}"
    with pytest.raises(UserError) as caught:
        data.open_source(spec)
    assert caught.value.exit_code == 2 and spec in str(caught.value) and named in str(caught.value)
    assert "\n" not in str(caught.value)


# --- Batches ---------------------------------------------------------------------------------------------------------


def batch(spec, image, target, index=0):
    out = spec.empty(1)
    spec.prepare(out, 0, image, target, 0, index)()
    return {name: array[0] for name, array in out.items()}


def test_a_whole_image_is_scaled_and_padded():
    target = np.zeros((20, 40), np.uint8)
    target[:, 30:] = 2
    image = np.where(target[..., None] == 2, np.uint8(255), np.uint8(0)).repeat(3, -1)
    got = batch(MasksSpec(16), image, target)
    assert (got["target"][8:] == IGNORED).all() and (got["image"][8:] == image_lib.MEAN_GREY).all()
    np.testing.assert_array_equal(got["target"][:8], np.where(np.arange(16) < 12, 0, 2)[None].repeat(8, 0))
    assert MasksSpec(16).scaled(20, 40) == (8, 16) and got["mask"]
    exact = batch(MasksSpec(16), photograph(0, (16, 16)), mask(0, (16, 16)))
    np.testing.assert_array_equal(exact["image"], photograph(0, (16, 16)))
    np.testing.assert_array_equal(exact["target"], mask(0, (16, 16)))


def test_in_training_the_mask_moves_with_the_image():
    """The image shows its own mask in large blocks: what a pixel looks like is what its mask says, away from the edges."""
    target = np.kron(mask(3, (4, 5)), np.ones((16, 16), np.uint8))
    image = (target[..., None] * 100).repeat(3, -1)
    spec = MasksSpec(48, 0, (0,), True, crop_scale=(0.3, 0.9), crop_ratio=(0.7, 1.4), flip=True)
    mirrored = set()
    for index in range(6):
        got = batch(spec, image, target, index)
        mirrored.add(bool(spec.mirrored(0, index)))
        assert (got["target"] != IGNORED).all()
        assert (np.abs(got["image"][..., 0].astype(int) - 100 * got["target"]) < 40).mean() > 0.9
    assert mirrored == {False, True}


def test_scenes_name_their_masks():
    source = data.open_source("scenes:8")
    found = np.unique(np.concatenate([source.masks("train", n).ravel() for n in range(8)]))
    assert source.mask_names == ["background", *"0123456789"] and found[0] == 0 and found[-1] <= 10
    assert len(found) == 1 + len({int(c) for n in range(8) for c in source.boxes("train", n).classes})
