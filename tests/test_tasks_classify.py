"""Classifying: files of any kind and damage, names, and top-1 and top-5 that do not depend on how they were batched."""

import json
import logging

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from qbheat_jax import api, data, methods
from qbheat_jax import config as config_lib
from qbheat_jax.data import decode, labels
from qbheat_jax.errors import UserError
from qbheat_jax.models import registry
from qbheat_jax.models.encoder import Encoder
from qbheat_jax.tasks import classify
from qbheat_jax.train import config_tables
from qbheat_jax.train.checkpoint import Checkpoints

SIZE, CLASSES = 32, 7
FRUIT = [(f"k{k}", name) for k, name in enumerate(["apple", "pear tree", "fig", "plum", "lime", "kiwi", "date"])]


class Patches(Encoder):
    """The least that is an encoder: one linear map of each patch. It compiles in no time."""

    drop_path: float = 0.0
    dtype: object = jnp.float32
    stride, width = 8, 6

    @nn.compact
    def __call__(self, images, train=False):
        return nn.relu(nn.Conv(self.width, (8, 8), (8, 8))(images)), {}


@pytest.fixture(scope="module", autouse=True)
def encoder():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.ENCODERS, "patches", registry.Entry(Patches, {}, {8: {}}))
        yield


def make(workdir, classes=CLASSES, names=None):
    """A workdir as `qbheat port` leaves it, of random weights."""
    given = {"objective": "classifier", "encoder.name": "patches", "image_size": SIZE, "head.classes": classes}
    config = config_lib.resolve(given, config_tables.CLASSIFIER)
    image = np.zeros((1, SIZE, SIZE, 3), np.uint8)
    variables = methods.build(config).init(jax.random.key(0), {"image": image})
    workdir.mkdir()
    if classes:  # large enough that the classes differ
        variables["params"]["head"]["classifier"]["kernel"] *= 1000
    text = config_lib.to_json(config)
    (workdir / "config.json").write_text(text)
    checkpoints = Checkpoints(workdir)
    checkpoints.save(0, {"step": np.zeros((), np.int32), **variables, "opt_state": {}, "ema": {}}, 0, text)
    checkpoints.close()
    if names:
        labels.save(workdir, names)
    return workdir


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make(tmp_path_factory.mktemp("classify") / "model", names=FRUIT)


@pytest.fixture(scope="module")
def nameless(tmp_path_factory):
    return make(tmp_path_factory.mktemp("classify") / "nameless")


@pytest.fixture(scope="module")
def expected(model):
    """Function of an image -> its class probabilities, straight from the model."""
    loaded = api.load(model)

    def probabilities(image):
        pixels = data.ImageSpec(SIZE, 0, (0,), False).image(image, 0, 0)
        return np.asarray(jax.nn.softmax(loaded.logits(pixels[None])))[0]

    return probabilities


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (48, 40, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, expected):
    """folder:ROOT with 19 pictures in val, each in the folder of what the model takes it for, but for four."""
    root = tmp_path_factory.mktemp("classify") / "set"
    names = [["k0", "Pear_Tree", "FIG", "plum", "lime", "kiwi", "k6"][k] for k in range(CLASSES)]
    truth = []
    for seed in range(19):
        order = np.argsort(-expected(picture(seed)))
        place = [6, 5, 4, 1][seed] if seed < 4 else 0
        truth.append(place)
        path = root / "val" / names[order[place]]
        path.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(seed)).save(path / f"{seed}.png")
    for name in names:  # every class has a folder; an empty one would be refused
        path = root / "train" / name
        path.mkdir(parents=True)
        Image.fromarray(picture(99)).save(path / "x.png")
    truth = np.asarray(truth)
    return root, (truth < 1).mean(), (truth < 5).mean()


def test_files_of_every_format_give_names_and_probabilities(model, expected, tmp_path):
    image = Image.fromarray(picture(1))
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.bmp")
    image.convert("L").save(tmp_path / "c.jpg")
    image.convert("P").save(tmp_path / "d.gif")
    paths = [tmp_path / name for name in ("a.png", "b.bmp", "c.jpg", "d.gif")]
    results = classify.images(model, paths, top=3)
    assert [result["path"] for result in results] == [str(path) for path in paths]
    for path, result in zip(paths, results):
        want = expected(decode.decode(path.read_bytes()))
        order = np.argsort(-want)[:3]
        assert [name for name, _ in result["top"]] == [FRUIT[k][1] for k in order]
        np.testing.assert_allclose([p for _, p in result["top"]], want[order], atol=1e-5)
    assert results[0]["top"] == results[1]["top"]


def test_more_files_than_a_batch_holds_are_all_classified_by_one_program(model, expected, tmp_path):
    paths = [tmp_path / f"{k}.png" for k in range(19)]
    for seed, path in enumerate(paths):
        Image.fromarray(picture(seed)).save(path)
    paths.insert(3, tmp_path / "missing.png")
    results = classify.images(model, paths, top=99)
    assert len(results) == 19
    for seed, result in enumerate(results):
        want = expected(picture(seed))
        assert result["top"][0][0] == FRUIT[want.argmax()][1] and len(result["top"]) == CLASSES
        assert sum(p for _, p in result["top"]) == pytest.approx(1, abs=1e-5)


def test_what_cannot_be_read_is_named_counted_and_left_out(model, tmp_path, caplog):
    good = tmp_path / "good.png"
    Image.fromarray(picture(0)).save(good)
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:200])
    bad = [tmp_path / name for name in ("text.png", "empty.png", "cut.png", "missing.png")] + [tmp_path]
    caplog.set_level(logging.INFO, "qbheat")
    assert [result["path"] for result in classify.images(model, [*bad, good])] == [str(good)]
    for path in bad:
        assert f"skipped {path}: " in caplog.text
    assert "skipped 5 of 6 files" in caplog.text
    with pytest.raises(UserError, match="none of the 5 files can be read"):
        classify.images(model, bad)
    for paths, top in (([], 5), ([good], 0)):
        with pytest.raises(UserError, match="at least one of each"):
            classify.images(model, paths, top)


def test_text_is_a_block_an_image(nameless, tmp_path):
    Image.fromarray(picture(0)).save(tmp_path / "a.png")
    results = classify.images(nameless, [tmp_path / "a.png", tmp_path / "a.png"], top=2)
    first, second = classify.text(results).split("\n\n")
    assert first == second and first.splitlines()[0].endswith("a.png") and "%  class " in first
    assert len(first.splitlines()) == 3


@pytest.mark.parametrize("count, batch", [(8, 16), (1, 5), (4, 64)])
def test_a_data_set_gives_the_same_figures_however_it_is_split(model, folder, tmp_path, monkeypatch, count, batch):
    root, top1, top5 = folder
    chosen = jax.devices()[:count]
    monkeypatch.setattr(jax, "devices", lambda *a: chosen)
    result = classify.dataset(model, f"folder:{root}", batch_size=batch, workdir=tmp_path / "out")
    assert result == json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["protocol"], result["split"], result["n"], result["skipped"]) == ("classify", "val", 19, 0)
    assert result["top1"] == pytest.approx(top1) and result["top5"] == pytest.approx(top5)
    assert result["init"] == str(model) and result["data"] == f"folder:{root}" and result["images_per_second"] > 0
    assert "top-1" in classify.line(result)


def test_other_sizes_and_splits(model, folder):
    result = classify.dataset(model, f"folder:{folder[0]}", split="train", image_size=40)
    assert (result["split"], result["n"], result["image_size"]) == ("train", CLASSES, 40)


def test_classes_without_names_are_taken_in_sorted_order(nameless, folder, caplog):
    caplog.set_level(logging.INFO, "qbheat")
    assert classify.dataset(nameless, f"folder:{folder[0]}")["n"] == 19
    assert "sorted order" in caplog.text


def test_an_unreadable_file_is_left_out_up_to_the_limit(model, folder, tmp_path):
    for split in ("train", "val"):
        for name in ("fig", "plum"):
            path = tmp_path / split / name
            path.mkdir(parents=True)
            Image.fromarray(picture(1)).save(path / "a.png")
    (tmp_path / "val" / "fig" / "b.png").write_text("no image")
    result = classify.dataset(model, f"folder:{tmp_path}", max_bad_fraction=0.5)
    assert (result["n"], result["skipped"]) == (2, 1)
    with pytest.raises(UserError, match="1 of 3 images"):
        classify.dataset(model, f"folder:{tmp_path}")


def test_a_model_without_a_classifier_says_what_to_do(tmp_path, folder):
    bare = make(tmp_path / "bare", classes=0)
    for call in (lambda: classify.images(bare, ["a.png"]), lambda: classify.dataset(bare, f"folder:{folder[0]}")):
        with pytest.raises(UserError, match="has no classifier: port a checkpoint with its head"):
            call()


def test_mistakes_are_one_sentence(model, folder, tmp_path):
    def fails(message, spec=f"folder:{folder[0]}", directory=model, **fields):
        with pytest.raises(UserError, match=message):
            classify.dataset(directory, spec, **fields)

    flat = tmp_path / "flat"
    flat.mkdir()
    Image.fromarray(picture(0)).save(flat / "a.png")
    fails("has no labels, which come from the names of folders", f"folder:{flat}")
    fails("has no split 'test'", split="test")
    fails("class 'astronaut' of the data is none of the model's 7 classes", "photos")
    fails("holds no run", directory=flat)
    fails("image_size=30 is not accepted", image_size=30)
    fails("image_size=-8 is not accepted", image_size=-8)
    fails("batch_size=0", batch_size=0)
    (tmp_path / "file").write_text("")
    fails("cannot be written", workdir=tmp_path / "file" / "below")

    alone = tmp_path / "set"
    for path in ("train/fig", "val/fig", "val/plum"):
        (alone / path).mkdir(parents=True)
        Image.fromarray(picture(0)).save(alone / path / "a.png")
    fails("1 images .*'plum'", f"folder:{alone}")


def test_a_list_of_names_of_another_length_is_refused(tmp_path):
    directory = make(tmp_path / "model", names=FRUIT[:3])
    with pytest.raises(UserError, match="names 3 classes, and the classifier has 7"):
        classify.images(directory, ["a.png"])
