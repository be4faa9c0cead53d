"""`folder:` as users have their images: splits by other names, other endings, what is no image, odd files and names."""

import os
import socket
import sys

import numpy as np
import pytest
from PIL import Image

from qbheat_jax import cli, data
from qbheat_jax.data import decode
from qbheat_jax.data.sources import base, files
from qbheat_jax.errors import UserError
from qbheat_jax.tools import doctor
from tests.batches import eval_batches


def picture(path, value=100):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Image.new("RGB", (8, 8), (value, 20, 30)).save(path, "PNG")
    return path


def opened(folder):
    return data.open_source(f"folder:{folder}")


@pytest.mark.parametrize(
    "names, splits",
    [
        (("Train", "Val", "Test"), {"train": 1, "val": 1, "test": 1}),
        (("TRAIN", "TEST"), {"train": 1, "test": 1}),
        (("training", "testing"), {"train": 1, "test": 1}),
        (("train2017", "val2017"), {"train": 1, "val": 1}),
        (("train", "Validation"), {"train": 1, "val": 1}),
        (("images/train", "images/val", "labels/train"), {"train": 1, "val": 1}),
        (("archive/train", "archive/valid"), {"train": 1, "val": 1}),
    ],
)
def test_splits_by_their_usual_names(tmp_path, names, splits):
    for name in names:
        picture(tmp_path / name / "a" / "1.png")
    source = opened(tmp_path)
    assert source.splits == splits and source.class_names == ["a"]


@pytest.mark.parametrize(
    "names, words",
    [
        (("train_images", "test_ops_images"), "train_images"),
        (("Trainset", "holdout"), "Trainset"),
        (("fold1/train", "fold2/train"), "fold1"),
        (("Train", "train"), "Train"),
        (("train2014", "train2017"), "train2014"),
    ],
)
def test_what_looks_like_a_split_is_never_trained_on_with_the_rest(tmp_path, names, words):
    for name in names:
        picture(tmp_path / name / "a" / "1.png")
    with pytest.raises(UserError) as caught:
        opened(tmp_path)
    assert words in str(caught.value) and caught.value.exit_code == 2


def test_what_lies_beside_the_splits_is_named(tmp_path, caplog):
    for name in ("train/a/1", "val/a/1", "test-dev/a/1", "stray"):
        picture(tmp_path / f"{name}.png")
    source = opened(tmp_path)
    assert source.splits == {"train": 1, "val": 1}
    assert len(source.notes) == 1 and "test-dev" in source.notes[0] and "1 images in" in source.notes[0]
    assert source.notes[0] in caplog.text, "the log has it"


def test_folders_of_operating_systems_are_no_classes(tmp_path):
    for name in ("cat", "@eaDir", "__MACOSX", "lost+found", "$RECYCLE.BIN", ".git"):
        picture(tmp_path / "train" / name / "1.png")
    assert opened(tmp_path).class_names == ["cat"]


def test_every_ending_that_pillow_reads_and_files_without_one(tmp_path):
    image = Image.new("RGB", (8, 8), (200, 20, 30))
    kinds = {
        "jfif": "JPEG",
        "jpe": "JPEG",
        "ppm": "PPM",
        "jp2": "JPEG2000",
        "apng": "PNG",
        "avif": "AVIF",
        "JPG": "JPEG",
    }
    (tmp_path / "train" / "a").mkdir(parents=True)
    for ending, kind in kinds.items():
        image.save(tmp_path / "train" / "a" / f"1.{ending}", kind)
    Image.new("L", (8, 8)).save(tmp_path / "train" / "a" / "1.pgm", "PPM")
    image.save(tmp_path / "train" / "a" / "without", "PNG")
    source = opened(tmp_path)
    assert source.splits == {"train": len(kinds) + 2} and source.notes == ()
    for index in range(source.splits["train"]):
        assert decode.decode(source.fetch("train", index)[0]).shape == (8, 8, 3)


def test_what_is_passed_over_is_counted_and_named(tmp_path, capsys, monkeypatch):
    picture(tmp_path / "a" / "1.png")
    for name in ("1.heic", "2.heic", "notes.txt", "bare"):
        (tmp_path / "a" / name).write_bytes(b"no image")
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path / "a")
        server.bind("socket.png")
        source = opened(tmp_path)
    assert source.splits == {"train": 1}
    (note,) = source.notes
    for words in (
        " 6 files",
        "2 .heic (such as",
        "1 .txt",
        "1 without an extension",
        "2 pipes, sockets or devices",
    ):
        assert words in note
    assert cli.main(["doctor", "--data", f"folder:{tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert note in out and "train: 1 of 1 images" in out

    (tmp_path / "a" / "1.png").unlink()
    with pytest.raises(UserError, match="2 .heic"):
        opened(tmp_path)


def test_doctor_names_classes_and_bad_files(tmp_path):
    for n in range(3):
        picture(tmp_path / "train" / "many" / f"{n}.png")
    picture(tmp_path / "train" / "few" / "1.png")
    (tmp_path / "train" / "many" / "2.png").write_bytes(b"torn")
    text = doctor.describe_data(f"folder:{tmp_path}")
    assert "from 1 images of 'few' to 3 of 'many'" in text
    assert "3 of 4 images" in text and "2.png: not an image" in text


@pytest.mark.skipif(sys.platform == "darwin", reason="this file system takes names in UTF-8 alone")
def test_odd_names_and_links(tmp_path, caplog):
    """Names that are not UTF-8, hold a line's end or are as long as can be; links that lead nowhere, or to themselves."""
    folder = tmp_path / "train" / "a"
    for name in (b"\xff\xfe.png", b"two\nlines.png", b"x" * 251 + b".png"):
        picture(os.path.join(os.fsencode(folder), name))
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "link.png").symlink_to(folder / os.fsdecode(b"\xff\xfe.png"))
    source = opened(tmp_path)
    assert source.splits == {"train": 6}
    assert source.identity("train") == opened(tmp_path).identity("train") and source.identity("train").isprintable()
    bad = data.BadFiles(1.0, 6)
    batches = eval_batches(source, split="train", batch_size=6, image_size=8, seed=0, bad=bad)
    batch = next(batches)
    batches.close()
    assert batch["mask"].sum() == 4 and bad.count == 2 and all(name.isprintable() for name in bad.names)
    (folder / "two\nlines.png").write_bytes(b"torn")
    bad = data.BadFiles(1.0, 6)
    batches = eval_batches(source, split="train", batch_size=6, image_size=8, seed=0, bad=bad)
    next(batches)
    batches.close()
    assert bad.count == 3 and all("\n" not in record.getMessage() for record in caplog.records)
    before = source.identity("train")
    picture(folder / "two\nlines.png", value=7)
    assert source.identity("train") != before, "another file is another image"


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.jpg")
    with pytest.raises(OSError, match="no regular file"):
        files.read(tmp_path / "x.jpg")
    with pytest.raises(OSError):
        files.read(tmp_path)


def test_a_label_that_train_does_not_have_is_named(tmp_path):
    picture(tmp_path / "train" / "a" / "1.png")
    picture(tmp_path / "val" / "b" / "1.png")
    with pytest.raises(UserError, match="only in 'val': b"):
        opened(tmp_path).check_labels("train", "val")


def test_labels_and_files_stay_together(tmp_path):
    for k, name in enumerate("cab"):
        for n in range(k + 1):
            picture(tmp_path / "train" / name / f"{n}.png", value=ord(name))
    source = opened(tmp_path)
    assert source.labels("train").dtype == np.int32 and not source.labels("train").flags.writeable
    for index in range(6):
        content, label, _ = source.fetch("train", index)
        assert decode.decode(content)[0, 0, 0] == ord("abc"[label]) == ord(source.class_names[label])
    assert isinstance(source, base.Source)


@pytest.mark.parametrize("length", [0, 1, 2, 7, 15])
def test_short_files_without_an_ending_are_no_images(tmp_path, length):
    picture(tmp_path / "1.png")
    (tmp_path / "short").write_bytes(b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\1\0\0\1"[:length])
    assert len(opened(tmp_path).notes) == (length < 3), "three bytes tell a JPEG"
