"""Names of classes: ImageNet's thousand, classes.tsv and its damages, and folders found among a model's outputs."""

import logging

import numpy as np
import pytest

from qbheat_jax.data import labels
from qbheat_jax.errors import UserError

KEYS, NAMES = zip(*labels.imagenet())


def test_imagenet_is_a_thousand_distinct_classes_in_order_of_their_ids():
    assert len(KEYS) == len(set(KEYS)) == 1000 and list(KEYS) == sorted(KEYS)
    assert all(len(key) == 9 and key[0] == "n" and key[1:].isdigit() for key in KEYS)
    assert len({labels._plain(name) for name in NAMES}) == 1000


@pytest.mark.parametrize(
    "place, key, name",
    [
        (0, "n01440764", "tench"),
        (134, "n02012849", "crane (bird)"),
        (281, "n02123045", "tabby cat"),
        (285, "n02124075", "Egyptian cat"),
        (517, "n03126707", "crane (machine)"),
        (638, "n03710637", "maillot (tights)"),
        (639, "n03710721", "maillot (swimsuit)"),
        (698, "n03877845", "palace"),
        (872, "n04485082", "tripod"),
        (967, "n07920052", "espresso"),
        (985, "n11939491", "daisy"),
        (999, "n15075141", "toilet tissue"),
    ],
)
def test_well_known_places(place, key, name):
    assert (KEYS[place], NAMES[place]) == (key, name)


def test_a_head_of_a_thousand_classes_gets_imagenets_names(tmp_path):
    assert labels.read(tmp_path) is None
    assert not labels.write(tmp_path, 10) and labels.read(tmp_path) is None
    assert labels.write(tmp_path, 1000) and labels.read(tmp_path) == labels.imagenet()


def test_what_is_saved_is_read_back_on_one_line_each(tmp_path):
    labels.save(tmp_path, [("a", "äpfel"), ("b", "two\nlines\tand a tab")])
    assert labels.read(tmp_path) == [("a", "äpfel"), ("b", "two lines and a tab")]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "classes.tsv is empty"),
        (b"a\tb\nc\n", "line 2 .*'c'.*KEY<TAB>NAME"),
        (b"a\tb\tc\n", "line 1 .*'c'.*KEY<TAB>NAME"),
        (b"a\tb\n\tc\n", "line 2 .*'c'.*KEY<TAB>NAME"),
        (b"a\t\xff\xfe\n", "classes.tsv cannot be read"),
    ],
)
def test_a_damaged_file_is_one_sentence(tmp_path, content, message):
    (tmp_path / "classes.tsv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        labels.read(tmp_path)


def test_folders_are_found_by_id_or_name_however_they_are_written():
    found = labels.match(
        ["n07920052", "Tabby_Cat", "crane machine", "jack o lantern", "great  white-shark"], KEYS, NAMES
    )
    assert found.tolist() == [967, 281, 517, 607, 2] and found.dtype == np.int32


def test_a_key_comes_before_another_class_s_name():
    assert labels.match(["x", "y"], ("x", "y"), ("y", "x")).tolist() == [0, 1]


def test_unknown_names_are_taken_in_sorted_order_only_if_there_are_as_many(caplog):
    caplog.set_level(logging.INFO, "qbheat")
    assert labels.match(["c", "a", "b"], ("0", "1", "2"), ("0", "1", "2")).tolist() == [2, 0, 1]
    assert "sorted order" in caplog.text
    with pytest.raises(UserError, match="class 'c' of the data is none of the model's 3 classes"):
        labels.match(["c", "a"], ("0", "1", "2"), ("0", "1", "2"))


def test_numbers_are_places_and_not_sorted_as_words(caplog):
    caplog.set_level(logging.INFO, "qbheat")
    names = [str(k) for k in range(1000)]
    assert labels.match(sorted(names), KEYS, NAMES).tolist() == [int(name) for name in sorted(names)]
    assert "are numbers" in caplog.text
    with pytest.raises(UserError, match="class '1000' of the data"):
        labels.match([str(k) for k in range(1, 1001)], KEYS, NAMES)


def test_one_unknown_name_among_known_ones_is_named():
    with pytest.raises(UserError, match=r"'unicorn' .* \(1 of 3 are not\).*such as 'n01440764' or 'tench'"):
        labels.match(["tench", "unicorn", "daisy"], KEYS, NAMES)
