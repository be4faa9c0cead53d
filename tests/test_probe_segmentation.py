"""Segmentation probes: counts by hand, the loss of cells, and whole probes on images whose colours are their classes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qbheat_jax import cli, compare, data, report
from qbheat_jax.compare import table
from qbheat_jax.data import decode
from qbheat_jax.data.sources.base import ArraySource
from qbheat_jax.data.specs.masks import IGNORED, MasksSpec
from qbheat_jax.errors import UserError
from qbheat_jax.eval import miou
from qbheat_jax.models.heads import LinearHead
from qbheat_jax.probe import encoders, fit, segmentation
from qbheat_jax.probe.features import Features
from qbheat_jax.report import load_run
from qbheat_jax.tasks import probe
from tests import workdirs
from tests.conftest import leave_one_device
from tests.probe_data import config, tiny

COLOURS = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200]])
NAMES = ["red", "green", "blue"]


class Patches(ArraySource):
    """Images of 32 pixels in 4 x 4 patches of three colours with noise; the mask is the colour, its first row ignored."""

    boxed = True

    def __init__(self, shuffled=""):
        super().__init__("patches", {"train": 24, "val": 8, "test": 13}, list("ab"))
        self.mask_names, self._made = NAMES, {}
        for seed, (split, n) in enumerate(self.splits.items()):
            generator = np.random.default_rng(seed)
            cells = generator.integers(0, 3, (n, 4, 4)).astype(np.uint8)
            truth = np.kron(cells, np.ones((1, 8, 8), np.uint8))
            images = (COLOURS[truth] + generator.integers(-25, 26, (n, 32, 32, 3))).astype(np.uint8)
            truth[:, 0] = IGNORED
            self._made[split] = images, generator.permutation(truth) if split == shuffled else truth

    def images(self, split):
        return self._made[self.split(split)][0]

    def masks(self, split, index):
        return self._made[self.split(split)][1][index]


@pytest.fixture
def patches(monkeypatch):
    monkeypatch.setattr(data, "open_source", lambda *a, **k: Patches())

    def opened(init, given):
        frozen = tiny()
        return encoders.dataclasses.replace(frozen, spec=MasksSpec(32), source="patches")

    monkeypatch.setattr(encoders, "open_init", opened)


FIELDS = {
    "seg-lin": {"optimizer": "adamw", "learning_rates": (0.03, 0.3), "total_epochs": 30},
    "seg-knn": {"knn__neighbours": (1, 5, 1000), "knn__temperatures": (0.07,), "knn__bank": 100},
}


def run(protocol, workdir, init="tiny", **fields):
    given = {"data__source": "patches", "batch_size": 8, **FIELDS[protocol], **fields}
    return probe.run(config(protocol=protocol, **given), workdir, init)


# --- The parts -------------------------------------------------------------------------------------------------------


def test_figures_are_the_plain_counts():
    generator = np.random.default_rng(0)
    truth = generator.choice([0, 1, 2, IGNORED], (3, 9, 9)).astype(np.uint8)
    found = generator.choice([0, 1, 2, 3, IGNORED], (3, 9, 9)).astype(np.uint8)
    figures = miou.figures(miou.pairs(truth, found, 5), list("abcde"))
    counted = truth != IGNORED
    for k, name in enumerate("abcd"):
        both, either = ((truth == k) & (found == k))[counted], ((truth == k) | (found == k))[counted]
        assert figures["per_class"][name] == pytest.approx(both.sum() / either.sum())
    assert list(figures["per_class"]) == list("abcd")  # e is in neither
    assert figures["mIoU"] == pytest.approx(np.mean(list(figures["per_class"].values())))
    assert figures["pixel_accuracy"] == pytest.approx((truth == found)[counted].mean())
    nothing = miou.pairs(np.full((2, 2), IGNORED), np.zeros((2, 2), np.uint8), 2)
    assert miou.figures(nothing, "ab") == {"mIoU": None, "pixel_accuracy": None, "per_class": {}}


def test_cells_count_their_pixels():
    masks = np.random.default_rng(1).choice([0, 1, 2, IGNORED], (2, 12, 12)).astype(np.uint8)
    counts = segmentation.cell_counts(masks, 3, 2, 3)
    for n, i, j, k in np.ndindex(counts.shape):
        assert counts[n, i, j, k] == (masks[n, 4 * i : 4 * i + 4, 6 * j : 6 * j + 6] == k).sum()


def test_scores_are_scaled_up_before_the_best_is_taken():
    scores = np.random.default_rng(2).normal(size=(2, 3, 2, 4, 5)).astype(np.float32)
    scores[1, 2, 0, 0, 3] = np.nan
    found = np.asarray(segmentation.best_classes(jnp.asarray(scores), 8))
    want = jax.image.resize(scores, (2, 3, 8, 8, 5), "bilinear").argmax(-1)
    assert found.shape == (2, 3, 8, 8) and (found[1, 2] == IGNORED).all()
    np.testing.assert_array_equal(np.where(found == IGNORED, want, found), want)
    assert (found == IGNORED).sum() == 64


def test_ignored_pixels_teach_nothing_and_others_weigh_the_same():
    """The gradient is that of all pixels with the scores of their cell, counted one by one."""
    generator = np.random.default_rng(3)
    masks = generator.choice([0, 1, 2, IGNORED], (4, 8, 8)).astype(np.uint8)
    masks[:, :4, :4] = IGNORED
    x = generator.normal(size=(4, 2, 2, 5)).astype(np.float32)
    counts = segmentation.cell_counts(masks, 2, 2, 3)
    shared = dict(classes=3, learning_rates=(0.5,), weight_decays=(0.0,), optimizer="sgd", momentum=0.0, warmup_epochs=0.0,
                  epochs=1.0, label_smoothing=0.0)  # fmt: skip
    cells = fit.fit(segmentation.CellRecipe(head=LinearHead(3), batch_size=4, **shared), Features.of(x, counts), 0)
    pixels = masks != IGNORED
    each = x.repeat(4, 1).repeat(4, 2)[pixels]
    plain = fit.Recipe(head=LinearHead(3), batch_size=len(each), **{**shared, "learning_rates": (0.5 * 4 / len(each),)})
    one_by_one = fit.fit(plain, Features.of(each, masks[pixels]), 0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), cells, one_by_one)


@pytest.mark.parametrize("init, channels", [("pixels", 768), ("histogram", 64)])
def test_trivial_features_are_those_of_a_cell_by_itself(init, channels):
    images = np.random.default_rng(4).integers(0, 256, (2, 32, 48, 3)).astype(np.uint8)
    each = {"pixels": encoders.pixels, "histogram": encoders.histogram}[init]
    maps = np.asarray(encoders._by_cell(each, {}, jnp.asarray(images)))
    assert maps.shape == (2, 2, 3, channels)
    np.testing.assert_allclose(maps[1, 1, 2], each(jnp.asarray(images[1:, 16:, 32:]))[0, 0, 0], atol=1e-6)
    if init == "pixels":
        np.testing.assert_allclose(maps[0, 0, 1], images[0, :16, 16:32].reshape(-1) / 255, atol=1e-6)


# --- Whole probes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", FIELDS)
def test_colours_are_segmented(patches, tmp_path, protocol):
    result = run(protocol, tmp_path)
    assert result == json.loads((tmp_path / "result.json").read_text())
    assert result["mIoU"] > 0.7 and set(result["per_class"]) == set(NAMES) and result["metrics"][0] == "mIoU"
    assert result["mIoU"] == pytest.approx(np.mean(list(result["per_class"].values())))
    assert (result["n"], result["n_train"], result["n_holdout"], result["classes"]) == (13, 32, 8, 3)
    source = Patches()
    train, test = (np.stack([source.masks(s, n) for n in range(source.splits[s])]) for s in ("train", "test"))
    common = int(np.bincount(train[train != IGNORED]).argmax())
    share = (test == common).sum() / (test != IGNORED).sum()
    assert result["constant"] == {
        "class": NAMES[common],
        "mIoU": pytest.approx(share / 3),
        "pixel_accuracy": pytest.approx(share),
    }
    if protocol == "seg-knn":
        assert (
            result["hparams"] == {"neighbours": 1, "temperature": 0.07, "bank": 100} or result["hparams"]["bank"] == 100
        )
    right, counted = 0, 0
    for path in (tmp_path / "predictions").iterdir():
        found, truth = decode.decode_numbers(path.read_bytes()), source.masks("test", int(path.stem))
        right, counted = right + (found == truth).sum(), counted + (truth != IGNORED).sum()
    assert len(list((tmp_path / "predictions").iterdir())) == 12 and 0.75 < right / counted <= 1
    assert "mIoU" in probe.line(result) and f"{result['constant']['mIoU']:.3f}" in probe.table([result])


@pytest.mark.parametrize("protocol", FIELDS)
def test_test_masks_have_no_say(patches, tmp_path, monkeypatch, protocol):
    honest = run(protocol, tmp_path / "a", total_epochs=3)
    monkeypatch.setattr(data, "open_source", lambda *a, **k: Patches(shuffled="test"))
    shuffled = run(protocol, tmp_path / "b", total_epochs=3)
    for key in ("hparams", "holdout_mIoU"):
        assert honest[key] == shuffled[key]
    assert honest["mIoU"] != shuffled["mIoU"]
    for path in (tmp_path / "a" / "predictions").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / "predictions" / path.name).read_bytes()


def test_the_number_depends_on_neither_devices_batch_nor_cache(patches, tmp_path, monkeypatch):
    chosen, everything = ("mIoU", "pixel_accuracy", "holdout_mIoU"), jax.local_devices()
    found = []
    for count, fields in ((8, {}), (1, {"batch_size": 13}), (2, {"batch_size": 5, "cache_gib": 1e-9})):
        monkeypatch.setattr(jax, "local_devices", lambda count=count: everything[:count])
        found.append(run("seg-knn", tmp_path / str(count), **fields))
    assert (tmp_path / "2" / "features").is_dir() and not (tmp_path / "1" / "features").exists()
    for other in found[1:]:
        assert [other[key] for key in chosen] == pytest.approx([found[0][key] for key in chosen], abs=1e-3)


def test_both_protocols_share_what_was_encoded(patches, tmp_path):
    store = probe.FeatureCache(tmp_path / "features")
    rates = []
    for protocol in FIELDS:
        given = config(
            protocol=protocol, data__source="patches", batch_size=8, **{**FIELDS[protocol], "total_epochs": 1}
        )
        rates.append(probe.run(given, tmp_path / protocol, "tiny", store)["encode_images_per_second"])
    assert set(rates[0]) == {"train", "val", "test"} and rates[1] == {}


@pytest.mark.parametrize(
    "fields, init, named",
    [
        ({"augment": True}, "random", "augment=True"),
        ({"data__fraction": 0.5}, "random", "data.fraction=0.5"),
        ({"optimizer": "ridge"}, "random", "optimizer='ridge'"),
        ({"image_size": 40}, "pixels", "image_size=40"),
        ({"data__source": "photos"}, "pixels", "'photos' has no masks"),
        ({"protocol": "seg-knn", "knn__neighbours": (5000,), "knn__bank": 100, "data__source": "scenes:8"}, "pixels",
         "knn.neighbours"),
    ],
)  # fmt: skip
def test_what_cannot_be_segmented_is_one_sentence(tmp_path, fields, init, named):
    with pytest.raises(UserError) as caught:
        probe.run(config(**{"protocol": "seg-lin", **fields}), tmp_path, init)
    assert named in str(caught.value) and "\n" not in str(caught.value) and caught.value.exit_code == 2


# --- On the command line and on pages --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def segmented(tmp_path_factory):
    """The workdir of a segmentation of scenes by their pixels, from the command line."""
    workdir = tmp_path_factory.mktemp("segmented")
    command = ["probe", "--config", "configs/segment/lin.py", "--init", "pixels", "--workdir", str(workdir)]
    fields = {"data.source": "scenes:16", "image_size": 64, "total_epochs": 1, "learning_rates": "(0.1,)"}
    with pytest.MonkeyPatch.context() as patch:
        leave_one_device(patch)
        assert cli.main([*command, *(f"--config.{key}={value}" for key, value in fields.items())]) == 0
    return workdir


def test_the_page_shows_the_masks(segmented, tmp_path):
    page = report.write(segmented).read_text()
    assert page.count("Its predicted mask") == 2 and "background" in page and "always background" in page
    result = json.loads((segmented / "result.json").read_text())
    assert f"{100 * result['mIoU']:.1f}" in page
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "config.json").write_text((segmented / "config.json").read_text())
    workdirs.write_json(other / "result.json", {**result, "data": "masks:/no/such/folder"})
    assert "There are no pictures" in report.write(other).read_text()


def test_the_page_of_a_run_lists_its_segmentations(segmented, tmp_path):
    workdirs.write_config(tmp_path)
    result = json.loads((segmented / "result.json").read_text())
    for name, value in (("a", 0.25), ("b", 0.75)):
        workdirs.write_json(tmp_path / "probe" / name / "result.json", {**result, "mIoU": value})
    (group,) = load_run.read(tmp_path).groups("mIoU")
    assert group.mean("mIoU") == 0.5 and group.protocol == "seg-lin"
    assert load_run.read(tmp_path).groups() == []


def test_a_comparison_takes_segmentations(segmented, tmp_path):
    """With their own data and figure, beside a probe of whole images."""
    masks = {"protocol": "seg-knn", "data": {"source": "scenes:8"}, "image_size": 64, "encoder": {"name": "vit_b"}}
    (tmp_path / "masks.py").write_text(f"def get_config():\n    return {masks!r}\n")
    plan = compare.read(workdirs.comparison_config(tmp_path, probes={"linear": "lin.py", "masks": "masks.py"}))
    chosen = plan.probes["masks"]
    assert (chosen.data.source, chosen.image_size, chosen.encoder.name) == ("scenes:8", 64, "pebble")
    workdirs.compared(plan, tmp_path)
    quoted = json.loads((segmented / "result.json").read_text())
    cells = [cell for cell in plan.cells() if cell.probe == "masks"]
    assert {cell.method.name for cell in cells} == {"supervised", "masked", "random", "pixels"}
    for n, cell in enumerate(cells):
        workdirs.write_json(tmp_path / cell.path / "result.json", {**quoted, "mIoU": 0.1 + n / 100, "seed": cell.seed})
    result = table.gather(plan, tmp_path, {})
    assert result["headlines"] == {"linear": "top-1", "masks": "mIoU"}
    assert result["methods"]["supervised"]["probes"]["masks"]["seeds"]["0"] == 0.1
    assert "mIoU of masks on scenes:8" in result["figures"] and result["figures"].startswith("Top-1 on test images of")
    assert "0.10" in table.text(result)
