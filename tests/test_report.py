"""The report page: self-contained, its numbers those of the files, and no part of a run that it cannot do without."""

import base64
import html.parser
import io
import re
import sys
import types

import numpy as np
import pytest
from PIL import Image

from qbheat_jax import config as config_lib
from qbheat_jax import methods, report
from qbheat_jax.errors import UserError
from qbheat_jax.methods import base
from qbheat_jax.ops import quarters
from qbheat_jax.report import charts, feature_map, load_run, sample, tiles
from qbheat_jax.report import text as text_lib
from qbheat_jax.train import config_tables
from tests.probe_data import Blobs
from tests.workdirs import (
    CHANNELS,
    SIZE,
    add_detectors,
    add_probe,
    add_results,
    make_config,
    make_images,
    make_model,
    write_config,
    write_json,
)


class Page(html.parser.HTMLParser):
    """Tags with their attributes, the text, and whether what was opened was closed."""

    VOID = {"meta", "img", "br", "link", "hr", "input", "source", "wbr"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(text)
        self.text = re.sub(r"[ \n]+", " ", " ".join(self.texts))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def bare(tmp_path):
    """A run that has only just been set up."""
    write_config(tmp_path)
    return tmp_path


@pytest.fixture
def workdir(bare):
    """A run with everything."""
    add_results(bare)
    return bare


def build(workdir, **kwargs):
    config = config_tables.from_json((workdir / "config.json").read_text())
    path = report.write(workdir, model=make_model(config), images=kwargs.pop("images", None) or make_images(**kwargs))
    assert path == workdir / "report" / "index.html"
    return Page(path.read_text(encoding="utf-8"))


def rows(page_path):
    """Cells of every row of every table, tags taken out."""
    text = page_path.read_text(encoding="utf-8")
    cells = [re.findall(r"<t[hd]\b[^>]*>(.*?)</t[hd]>", row, re.S) for row in re.findall(r"<tr\b.*?</tr>", text, re.S)]
    return [[re.sub(r"[ \n]+", " ", re.sub(r"<[^>]+>", "", cell)).strip() for cell in row] for row in cells]


def test_detectors_have_a_table_of_their_own(workdir):
    add_detectors(workdir)
    page = build(workdir)
    found = [row for row in rows(workdir / "report" / "index.html") if "dense" in row]
    assert found == [
        ["QB-Heat (best)", "dense", "scenes", "25.0 \u00b1 7.1\u202f%", "50.0 \u00b1 14.1\u202f%", "\u2013", "0, 1"],
        ["random initialisation", "dense", "scenes", "10.0\u202f%", "20.0\u202f%", "\u2013", "0"],
    ]
    assert "qbheat detect --init random --seed 0" in page.text and "Detector dense on scenes, QB-Heat" in page.text


def test_page_is_self_contained_and_well_formed(workdir):
    page = build(workdir)
    assert page.open == []
    assert not page.all("script") and not page.all("link")
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            value = attributes.get(name) or ""
            if tag != "a":
                assert value.startswith(("data:", "#")) or not value, (tag, value)
    text = (workdir / "report" / "index.html").read_text()
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for attributes in page.all("a"):
        assert attributes["href"].startswith("https://arxiv.org/") or attributes["href"][1:] in ids


def test_every_image_has_words_and_decodes(workdir):
    pictures = build(workdir).all("img")
    shown = sample.count(5)
    assert len(pictures) == 5 * shown * 4 + 9  # each placement, four tiles an image; and three rows at the top
    for attributes in pictures:
        assert attributes["alt"].strip()
        head, _, body = attributes["src"].partition(",")
        assert head == "data:image/png;base64"
        image = Image.open(io.BytesIO(base64.b64decode(body)))
        assert image.size in ((SIZE, SIZE), (SIZE // 2, SIZE // 2))


def test_large_images_become_small_jpegs():
    uri = tiles.data_uri(np.zeros((512, 512, 3), np.uint8))
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert uri.startswith("data:image/jpeg") and image.size == (256, 256)


def test_numbers_are_those_of_the_files(workdir):
    page = build(workdir)
    table = rows(workdir / "report" / "index.html")
    ours = next(row for row in table if row[0].startswith("QB-Heat") and "81.2" in row[1])
    assert ours[0] == "QB-Heat (best)"
    assert ours[1:6] == [text_lib.percent(0.8123), "+15.1", text_lib.percent(0.977), "1,000", "0"]
    assert ours[6].replace("\u00a0", " ") == "learning rate 0.3"
    found = {row[0]: row for row in table}
    assert found["random initialisation"][1:3] == [text_lib.percent(0.6612), text_lib.NONE]
    assert found["raw pixels, no encoder"][1:3] == [text_lib.percent(0.3021), "\u221235.9"]
    assert found["colour histogram, no encoder"][1] == text_lib.percent(0.4911)
    assert found["chance"][1] == text_lib.percent(0.05)
    assert any(row[1:2] == [text_lib.percent(0.85, np.std([0.84, 0.86], ddof=1))] and row[5] == "0, 1" for row in table)
    for text in (
        "0.247",
        "0.987",
        "3 min 21 s",
        "432",
        "567",
        text_lib.percent(0.0421),
        "+15.1 points",
        "standard error 1.2 points",
    ):
        assert text in page.text, text
    assert "40 steps of 16 images, 2 passes over 320 images" in page.text


def test_config_and_commands(workdir, monkeypatch):
    monkeypatch.chdir(workdir.parent)
    page = build(workdir)
    name = workdir.name
    assert f"qbheat pretrain --config configs/photos.py --workdir {name}" in page.text
    assert f"qbheat report --workdir {name}" in page.text
    assert str(workdir) not in (workdir / "report" / "index.html").read_text()
    table = {row[0]: row for row in rows(workdir / "report" / "index.html")}
    assert table["total_steps"][1] == "40" and table["decoder.depth"][2] == config_tables.PRETRAIN["decoder.depth"].doc


def test_names_are_escaped(workdir):
    assert "&lt;class 0&gt;" in (build(workdir), (workdir / "report" / "index.html").read_text())[1]


@pytest.mark.parametrize("placements", sorted(quarters.PLACEMENT_SETS))
def test_every_placement_is_shown(bare, placements):
    write_config(bare, **{"quarter.placements": placements})
    page = build(bare)
    for quarter in quarters.PLACEMENT_SETS[placements]:
        assert f"Visible: {text_lib.placement(quarter)}" in page.text


def test_missing_parts_are_left_out(bare):
    page = build(bare)
    assert "Nothing has been probed yet" in page.text
    assert "No losses were logged" in page.text
    assert "command of the pre-training was not recorded" in page.text


def test_torn_and_foreign_files_are_left_out(bare):
    write_json(bare / "elsewhere" / "deep" / "result.json", {"AP": 0.3})
    (bare / "probe" / "torn").mkdir(parents=True)
    (bare / "probe" / "torn" / "result.json").write_text('{"protocol": "lin", ')
    write_json(bare / "probe" / "plain" / "result.json", {"protocol": "lin", "init": "random", "top1": 0.5})
    (bare / "summary.json").write_text("{")
    page = build(bare)
    assert text_lib.percent(0.5) in page.text and "left no accuracy curves" in page.text


def test_images_that_cannot_be_opened_are_named(bare):
    (bare / "config.json").write_text(config_lib.to_json(make_config(**{"data.source": "folder:/no/such/folder"})))
    config = config_tables.from_json((bare / "config.json").read_text())
    page = Page(report.write(bare, model=make_model(config)).read_text())
    assert "There are no pictures on this page" in page.text and not page.all("img")


def test_probes_of_another_run_and_on_other_data_stand_apart(workdir, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    add_probe(workdir, "lin-other", "lin", str(other), 0.7)
    add_probe(workdir, "lin-data", "lin", "/moved/away", 0.4, data="folder:x")
    page = build(workdir)
    assert f"QB-Heat, run {other.name}" in page.text
    groups = {(g.protocol, g.data, g.features): g.mean("top1") for g in load_run.read(workdir).groups()}
    assert groups["lin", "photos", "QB-Heat"] == 0.8123 and groups["lin", "folder:x", "QB-Heat"] == 0.4


def test_no_run(tmp_path, bare):
    with pytest.raises(UserError, match="holds no run"):
        report.write(tmp_path / "empty")
    with pytest.raises(UserError, match="holds no run"):
        report.write(bare)  # a config, but no checkpoint
    (bare / "config.json").write_text("{")
    with pytest.raises(UserError, match="holds no run"):
        report.write(bare, model=make_model(make_config()))


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_missing_extra_is_named(workdir, monkeypatch, missing):
    monkeypatch.setitem(__import__("sys").modules, missing, None)
    with pytest.raises(UserError, match=r"pip install 'qbheat_jax\[report\]'"):
        build(workdir)


def test_images_of_a_run_are_drawn_from_what_it_was_not_trained_on():
    drawn = sample.draw(make_config(**{"data.source": "synthetic:800"}))
    assert drawn.split == "test" and not drawn.trained_on and drawn.images.shape[1:] == (SIZE, SIZE, 3)
    assert len(drawn.images) == len(drawn.names) == sample.POOL
    again = sample.draw(make_config(**{"data.source": "synthetic:800"}))
    np.testing.assert_array_equal(drawn.images, again.images)
    assert len(set(drawn.names[: sample.count(5)])) == sample.count(5)


@pytest.mark.parametrize("quarter", range(9))
def test_trivial_fill_and_error(quarter):
    images = make_images(3).images
    filled = tiles.mean_fill(images, quarter)
    hidden = quarters.masked(SIZE, SIZE)[quarter]
    seen = tiles.visible(images, quarter)
    np.testing.assert_array_equal(filled[:, ~hidden], images[:, ~hidden])
    np.testing.assert_array_equal(filled[:, hidden][:, 0], seen.mean((1, 2)).round().astype(np.uint8))
    assert (tiles.errors(images, images, quarter) == 0).all()
    off = images.copy()
    off[:, ~hidden] ^= 255  # what is visible does not count
    assert (tiles.errors(off, images, quarter) == 0).all()
    settled = tiles.settled(images, quarter)
    np.testing.assert_array_equal(settled[:, ~hidden], images[:, ~hidden])
    # Heat has no sources: no hidden pixel is darker or brighter than every visible one.
    assert (settled.max((1, 2)) <= seen.max((1, 2))).all() and (settled.min((1, 2)) >= seen.min((1, 2))).all()
    # The visible block lies where the page draws it.
    left, top = (SIZE * share // 100 for share in tiles.box(quarter))
    np.testing.assert_array_equal(images[:, top : top + SIZE // 2, left : left + SIZE // 2], seen)


def test_reconstruction_in_chunks_of_one_size():
    sizes = []

    def reconstruct(images, quarter, blend):
        sizes.append(len(images))
        return images

    images = make_images(70).images
    made = tiles.reconstruct(types.SimpleNamespace(reconstruct=reconstruct), images, 4)
    np.testing.assert_array_equal(made, images)
    assert len(set(sizes)) == 1


@pytest.mark.parametrize(
    "propagator,directions",
    [(p, d) for p in ("offset", "power", "exp", "spectral") for d in ("tied", "untied")]
    + [("autoregressive", "untied")],
)
def test_every_operator_is_described(bare, propagator, directions):
    import jax

    from qbheat_jax.ops import heat

    norm = "layer" if propagator == "autoregressive" else "none"
    choice = heat.Heat(propagator, directions, norm, init_scale=0.3)
    config = make_config(**{"heat.propagator": propagator, "heat.directions": directions, "heat.norm": norm})
    (bare / "config.json").write_text(config_lib.to_json(config))
    model = make_model(config)
    model.variables["params"]["decoder"]["heat"] = heat.init(jax.random.key(0), CHANNELS, choice)
    page = Page(report.write(bare, model=model, images=make_images()).read_text())
    expected = float(heat.describe(model.variables["params"]["decoder"]["heat"], choice)["norm/x+"])
    assert text_lib.number(expected) in page.text
    assert ("A\u2212, to the left" in page.text) == (directions == "untied")
    assert ("an eigenvalue is no growth factor" in page.text) == (norm == "layer")
    assert page.text.count("real, median |λ|") == (1 if directions == "tied" else 2)


def test_a_propagator_without_a_and_b_is_named(bare):
    config = make_config(**{"heat.propagator": "cosine"})
    (bare / "config.json").write_text(config_lib.to_json(config))
    model = make_model(config)
    model.variables["params"]["decoder"]["heat"] = {n: np.zeros(CHANNELS, np.float32) for n in ("linear", "quadratic")}
    text = Page(report.write(bare, model=model, images=make_images()).read_text()).text
    assert "cosine has no A and B" in text and "Eigenvalues" not in text


def test_untrained_operator_has_no_correlation(bare):
    model = make_model(make_config())
    model.variables["params"]["decoder"]["heat"] = {n: np.zeros((4, 4), np.float32) for n in ("x+", "x-", "y+", "y-")}
    text = Page(report.write(bare, model=model, images=make_images()).read_text()).text
    assert "undefined: B is singular" in text and text.count("none: B is singular") == 2


def test_charts_take_the_colours_of_the_page():
    svg = charts.losses(([1, 2], [1.0, 0.5]), ([2], [0.6]), ([], []), ([], []))
    assert svg.startswith("<svg") and "var(--warm)" in svg and "http" not in svg
    assert "predicting the mean" not in svg  # nothing was logged of it
    assert charts._INK not in svg and "font-family" not in svg


def test_steps_and_epochs_are_whole():
    """Where an axis counts, no tick of it is a fraction; the other axes of these charts are of numbers from 100 on."""
    nothing, points = ([], []), ([20, 21], [100, 300])
    for svg in (
        charts.losses(points, nothing, nothing, nothing),
        charts.precisions({"AP": points}),
        charts.accuracies([([20, 21], [1.0, 3.0])], [], None, "lin"),
    ):
        ticks = [float(text) for text in re.findall(r">([\d.]+)</text>", svg)]
        assert {20, 21} <= set(ticks) and all(tick.is_integer() for tick in ticks)


@pytest.mark.parametrize(
    "value, text",
    [(1500, "1,500"), (0.00015, "0.00015"), (1.5e-5, "1.5 \u00d7 10\u207b\u2075"), (None, text_lib.NONE),
     (float("nan"), text_lib.NONE), (-0.5, "\u22120.5"), (539.81, "540"), (0.0, "0")],
)  # fmt: skip
def test_numbers_for_people(value, text):
    assert text_lib.number(value) == text


def test_words():
    assert text_lib.points(-0.012) == "\u22121.2" and text_lib.points(0.152) == "+15.2"
    assert [text_lib.duration(s) for s in (3.21, 51.3, 184, 5000)] == ["3.2 s", "51 s", "3 min 4 s", "1 h 23 min"]
    assert [text_lib.millions(n) for n in (12, 84210, 5812345)] == ["12", "84.2 thousand", "5.81 million"]
    facts = dict(text_lib.facts(make_config(warmup_epochs=2.0, ema=0.99), 40, None, 1230))
    assert "warm-up 2 epochs" in facts["Learning rate"] and "0.99" in facts["Weights"] and "1.23" in facts["Encoder"]
    pretraining = methods.names(base.PRETRAIN)
    assert pretraining and all(methods.METHODS[name].STORY for name in pretraining)


@pytest.mark.parametrize("objective", methods.names(base.PRETRAIN))
def test_every_field_of_a_method_is_among_its_facts(objective):
    fields = config_lib.flatten(make_config(objective=objective))
    facts = dict(text_lib.facts(make_config(objective=objective), 40, 320, None))
    own = [key for key in fields if key.startswith("heat." if objective == "qbheat" else f"{objective}.")]
    assert own and {key: text_lib.setting(fields[key]) for key in own}.items() <= facts.items()


def test_monitors_are_drawn(workdir):
    page = build(workdir)
    assert "Last: RankMe 49.0, LiDAR 7.2" in page.text and "Last: \u03b1-ReQ 1.50" in page.text
    assert f"Last: k-NN {text_lib.percent(0.9)}" in page.text


def test_features_are_drawn_by_class(monkeypatch):
    monkeypatch.setattr(feature_map.data, "open_source", lambda *_, **__: Blobs())
    config = make_config(image_size=32)
    model = types.SimpleNamespace(config=config, features=lambda images: images[:, ::8, ::8].astype(np.float32))
    found = feature_map.draw(config, model)
    assert (found["n"], found["split"], found["classes"]) == (41, "test", 4)
    assert found == feature_map.draw(config, model)
    for name in "abcd":
        assert f">{name}</text>" in found["svg"]
    monkeypatch.setattr(feature_map, "CLASSES", 2)
    assert ">other classes</text>" in feature_map.draw(config, model)["svg"]
    monkeypatch.setattr(feature_map.data, "open_source", lambda *_, **__: Blobs(labelled=False))
    assert feature_map.draw(config, model) is None


def test_without_scikit_learn_the_features_are_not_drawn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(UserError, match=r"qbheat_jax\[report\]"):
        feature_map.embed(np.zeros((5, 2), np.float32), 0)
