"""What A and B learnt: known fields are found again, shuffled ones are not, and the page holds what the files hold."""

import base64
import csv
import io
import json
import re

import jax
import numpy as np
import pytest
from PIL import Image

from qbheat_jax import api, cli, methods, report, rng
from qbheat_jax.analysis import (
    continuations,
    decoder_images,
    extrapolation_test,
    hypothesis,
    image_summaries,
    maps,
    operators,
    outputs,
    pictures,
    ridge,
    target,
)
from qbheat_jax.errors import UserError
from qbheat_jax.methods.common.targets import Target
from qbheat_jax.ops import heat as heat_lib
from qbheat_jax.ops import quarters
from qbheat_jax.ops.heat import Heat
from qbheat_jax.report import analysis_page
from qbheat_jax.train import config_tables
from tests.test_report import Page
from tests.workdirs import ANALYSED, analyse_run

CELLS, HALF, WIDTH = 8, 4, 12
SIZES = {"train": 60, "val": 20, "test": 30}


@pytest.fixture(scope="module")
def known():
    """(A, B) that commute; over one cell their six pairs of features turn by odd eighths of a circle.

    So no difference vanishes, and the mean over a map does.
    """
    basis = np.eye(WIDTH) + 0.15 * np.random.default_rng(0).normal(size=(WIDTH, WIDTH))

    def generator(eighths):
        matrix = np.zeros((WIDTH, WIDTH))
        for i, k in enumerate(eighths):
            angle = 2 * np.pi * k / CELLS
            turn = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
            matrix[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = turn
        return HALF * (basis @ matrix @ np.linalg.inv(basis) - np.eye(WIDTH))

    return generator((1, 1, 3, 3, -1, 3)), generator((1, 3, 1, 3, 3, -1))


@pytest.fixture(scope="module")
def fields(known):
    """{role: float64 [N, 8, 8, C]}: z(x, y) = (I + B/n)^y (I + A/n)^x z(0, 0), over a mean map of its own."""
    generator = np.random.default_rng(1)
    right, down = (np.eye(WIDTH) + m / HALF for m in known)
    mean, made = generator.normal(size=(CELLS, CELLS, WIDTH)), {}
    for role, count in SIZES.items():
        z = np.empty((count, CELLS, CELLS, WIDTH))
        z[:, 0, 0] = generator.normal(size=(count, WIDTH))
        for x in range(1, CELLS):
            z[:, 0, x] = z[:, 0, x - 1] @ right.T
        for y in range(1, CELLS):
            z[:, y] = z[:, y - 1] @ down.T
        made[role] = z + mean
    return made


def near(found, expected):
    """Whether two sets of complex numbers are the same to 1e-3."""
    distance = np.abs(np.subtract.outer(np.asarray(found), np.asarray(expected)))
    return distance.min(0).max() < 1e-3 and distance.min(1).max() < 1e-3


def test_a_known_field_is_found_again(fields, known):
    departures = maps.departures(fields)
    rows, one_cell = hypothesis.steps(departures, seed=0)
    fitted = [row for row in [*hypothesis.derivatives(departures, seed=0), *rows] if row["predictor"] == "fitted"]
    assert len(fitted) == 2 * 2 + 4 * 3
    assert min(row["low"] for row in fitted) > 0.999
    copied = [row["r2"] for row in rows if row["predictor"] == "copy"]
    assert max(copied) < 0.9

    cells = {"x": HALF, "y": HALF}
    found = operators.describe(operators.fitted(one_cell, cells), operators.FITTED, cells)
    for name, matrix in (("x+", known[0]), ("y+", known[1])):
        assert near(np.array(found["spectrum"][name]) @ [1, 1j], np.linalg.eigvals(matrix))
        np.testing.assert_allclose(found["growth"][name], 1.0, atol=1e-3)
    assert found["commutator"]["+"] < 1e-3
    a, b = known
    expected = np.linalg.eigvals(-a @ a @ np.linalg.inv(b @ b))
    assert near(np.array(found["S"]["+"]["spectrum"]) @ [1, 1j], expected)
    speeds = found["speeds"]["+"]
    assert near(np.array(speeds["values"]) @ [1, 1j], np.linalg.eigvals(a @ np.linalg.inv(b)))
    assert speeds["condition"] == pytest.approx(np.linalg.cond(b), rel=1e-3) and speeds["real"] < 1


def test_speeds_are_shown_or_refused(known):
    """Of a fitted pair; of a learnt one that normalises every step, so has no growth, and whose B- is 0."""
    a, b = known
    zero = np.zeros_like(a)
    learnt = operators.describe(
        {"x+": a, "y+": b, "x-": a, "y-": zero}, Heat("autoregressive", norm="layer"), {"x": HALF, "y": HALF}
    )
    fitted = operators.describe({"x+": a, "x-": a, "y+": b, "y-": b}, operators.FITTED, {"x": HALF, "y": HALF})
    assert learnt["growth"] == {} and learnt["speeds"]["-"] == {"condition": None}
    result = json.loads(json.dumps({"operators": {"fitted": fitted, "learnt": learnt}, "cells": [CELLS, CELLS]}))
    shown = analysis_page._operators(result)
    assert [row["most"] is None for row in shown["rows"]] == [False] * 4 + [True] * 4
    assert ["values" in row for row in shown["speeds"]] == [True, True, True, False]
    assert "learnt operator: A+, B+" in shown["speeds_svg"] and "learnt operator: A\u2212" not in shown["speeds_svg"]
    text = outputs._speeds(result["operators"]).splitlines()
    assert len(text) == 2 + 4 and f"{np.linalg.cond(b):.3g}" in text[2]
    assert "infinite" in text[5] and "none" in text[5] and not any("none" in line for line in text[:5])


def test_on_shuffled_positions_nothing_is_found(fields):
    mixed = maps.departures({role: maps.shuffled(z, i) for i, (role, z) in enumerate(fields.items())})
    rows = [*hypothesis.derivatives(mixed, seed=0), *hypothesis.steps(mixed, seed=0)[0]]
    for row in rows:
        if row["predictor"] == "fitted":
            assert abs(row["r2"]) < 0.02 and row["low"] <= 0.01, row
    for role, z in fields.items():  # the same features as before
        again = maps.shuffled(z, 0)
        np.testing.assert_array_equal(np.sort(again.reshape(len(z), -1)), np.sort(z.reshape(len(z), -1)))


def test_quarters_of_a_known_field_are_continued(fields, known):
    """Fitted maps find what lies over half an image, the diagonal included, and the true operator predicts it."""
    a, b = (m.astype(np.float32) for m in known)
    back = [HALF * (np.linalg.inv(np.eye(WIDTH) + m / HALF) - np.eye(WIDTH)) for m in known]
    params = dict(zip(("x+", "x-", "y+", "y-"), (a, back[0].astype(np.float32), b, back[1].astype(np.float32))))
    whole = {role: z.astype(np.float32) for role, z in fields.items()}
    seen = {q: {r: z[(slice(None), *quarters.visible_slices(8, 8, q))] for r, z in whole.items()} for q in (0, 4)}

    def learnt(visible, quarter):
        placed = np.full(len(visible), quarter, np.int32)
        return np.asarray(heat_lib.extrapolate(params, Heat("power"), visible, placed, (quarter,)))

    rows = extrapolation_test.ExtrapolationTest(whole, seen, None, learnt).rows(seed=0)
    assert {(r["direction"], r["distance"]) for r in rows} == {
        *(("x+", 1.0), ("y+", 1.0), ("x+", 0.5), ("x-", 0.5), ("y+", 0.5), ("y-", 0.5)),
        *((part, None) for part in extrapolation_test.PARTS),
    }
    by = {name: [row["r2"] for row in rows if row["predictor"] == name] for name in ("learnt", "fitted", "copy")}
    assert min(by["fitted"]) > 0.999 and min(by["copy"][:-3]) < 0
    visible = next(row for row in rows if row["direction"] == "visible")
    assert visible["predictor"] == "copy" and visible["r2"] == pytest.approx(1)
    # What is not linear here is the mean map, which the true operator has to carry too, and carries otherwise.
    assert min(by["learnt"]) > 0.999


@pytest.mark.parametrize("name,mode", [("mirror", "symmetric"), ("border", "edge"), ("mean", None)])
def test_each_continuation_predicts_its_own_fields(name, mode):
    """Cosines predict mirrored blocks and their means too, by a time of 0 and a long one."""
    generator, whole, seen = np.random.default_rng(0), {}, {}
    for role, count in SIZES.items():
        block = generator.normal(size=(count, 4, 4, 3)).astype(np.float32)
        seen[role] = block
        if mode:
            whole[role] = np.pad(block, [(0, 0), (0, 4), (0, 4), (0, 0)], mode)
        else:
            whole[role] = np.broadcast_to(block.mean((1, 2), keepdims=True), (count, 8, 8, 3)).copy()
    rows = extrapolation_test.ExtrapolationTest(whole, {0: seen}).rows(seed=0)
    hidden = {row["predictor"]: row["r2"] for row in rows if row["direction"] == "hidden"}
    assert set(hidden) == {"fitted", "copy", *continuations.NAMES}
    assert {key for key, r2 in hidden.items() if r2 > 0.999} == ({name} if name == "border" else {name, "cosine"})


def test_intervals_are_over_images():
    generator = np.random.default_rng(0)
    total, error = generator.uniform(1, 2, 400), generator.uniform(0, 1, 400)
    many, few = ridge.explained(error, total, 0), ridge.explained(error[:20], total[:20], 0)
    assert many["low"] < many["r2"] < many["high"] and many["r2"] == pytest.approx(1 - error.sum() / total.sum())
    assert 3 < (few["high"] - few["low"]) / (many["high"] - many["low"]) < 7  # as the root of 400 / 20
    assert ridge.explained(np.zeros(5), np.ones(5), 0) == {"r2": 1.0, "low": 1.0, "high": 1.0}


def test_what_is_tested_on_is_never_fitted_on():
    class Source:
        spec, splits = "folder:x", {"all": 100}

    chosen = target.roles(Source, 1000, seed=0)
    rows = np.concatenate([rows for _, rows in chosen.values()])
    assert [len(r) for _, r in chosen.values()] == [50, 25, 25] and len(set(rows.tolist())) == 100
    Source.splits = {"train": 100, "test": 9}
    chosen = target.roles(Source, 40, seed=0)
    assert {role: (split, len(r)) for role, (split, r) in chosen.items()} == {
        "train": ("train", 40), "val": ("train", 20), "test": ("test", 9)
    }  # fmt: skip
    assert not set(chosen["train"][1]) & set(chosen["val"][1])
    Source.splits = {"train": 3}
    with pytest.raises(UserError, match="too few"):
        target.roles(Source, 10, seed=0)


def test_pictures():
    z = np.random.default_rng(0).normal(size=(4, 8, 8, 5)).astype(np.float32)
    colours = pictures.Colours.of(z)(z)
    assert colours.shape == (4, 8, 8, 3) and colours.dtype == np.uint8 and colours.std() > 30
    assert pictures.Colours.of(z[..., :1])(z[..., :1]).shape == (4, 8, 8, 3)
    like, cell = pictures.likeness(z[0])
    assert like[cell] == pytest.approx(1) and np.abs(like).max() <= 1.001 and 0 < min(cell) and max(cell) < 7
    assert pictures.error(z, z).max() == 0 and pictures.error(np.zeros_like(z), z).mean() == pytest.approx(1)


def test_statistics_are_never_the_targets_own():
    assert decoder_images.statistics(Target(8)) == "none"
    assert decoder_images.statistics(Target(8, True, 1.0)) == "predicted"
    assert decoder_images.statistics(Target(8, True, 0.0)) == "visible"


@pytest.fixture(scope="module")
def analysed_run(tmp_path_factory):
    """A run of two checkpoints, analysed by the command line in its own workdir."""
    run = tmp_path_factory.mktemp("run")
    analyse_run(run)
    return run


def check(path, images):
    """A page that needs no other file: every picture decodes, every link leads somewhere -> (Page, its text)."""
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [] and not page.all("script") and not page.all("link") and "@import" not in text
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    found = page.all("img")
    assert len(found) == images
    for attributes in found:
        assert attributes["alt"].strip()
        Image.open(io.BytesIO(base64.b64decode(attributes["src"].partition(",")[2]))).load()
    for attributes in page.all("a"):
        link = attributes["href"]
        assert link.startswith(("https://arxiv.org/", "data:")) or link[1:] in ids
    return page, text


def test_a_run_is_analysed(analysed_run):
    folder = analysed_run / "analysis"
    result = json.loads((folder / "analysis.json").read_text())
    with open(folder / "analysis.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["r2"]) for line in lines] == [row["r2"] for row in result["rows"]]
    kinds = {(row["encoder"], row["positions"], row["test"], row["predictor"]) for row in result["rows"]}
    assert ("trained", "true", "quarter", "learnt") in kinds and ("random", "true", "quarter", "fitted") in kinds
    assert ("trained", "shuffled", "derivatives", "fitted") in kinds and (
        "random",
        "true",
        "step",
        "learnt",
    ) not in kinds
    # The cells of noise have nothing to do with each other: a copy is as wrong as two of them differ, and no map does better.
    hidden = {(row["encoder"], row["predictor"]): row["r2"] for row in result["rows"] if row["direction"] == "hidden"}
    assert -1.4 < hidden["trained", "copy"] < -0.6 and hidden["trained", "fitted"] < 0.2
    assert result["statistics"] == "predicted" and result["placements"] == [4] and not result["no_quarters"]
    assert result["reconstructed"] == list(range(9))
    drift = {(row["step"], row["direction"]): row for row in result["drift"]}
    assert set(drift) == {(step, name) for step in (1, 2) for name in maps.DIRECTIONS}
    assert drift[1, "x+"]["to_last"] == pytest.approx(0.5) and drift[2, "x+"]["to_last"] == 0
    assert set(result["operators"]) == {"fitted", "learnt"}
    assert all("values" in operator["speeds"]["+"] for operator in result["operators"].values())
    assert (folder / "speeds.svg").read_text().startswith("<svg")

    moving = Image.open(folder / "spread.png")
    assert moving.n_frames == decoder_images.FRAMES
    moving.seek(moving.n_frames - 1)
    still = np.asarray(Image.open(folder / "spread_end.png"))
    np.testing.assert_array_equal(np.asarray(moving.convert("RGBA")), still)
    gaps = still[0, :, 3] == 0  # on a light page and on a dark one
    assert gaps.sum() == 3 * 4 * len(still) // 32 and (still[:, ~gaps, 3] == 255).all()
    for name in ("features", "placements", "beyond"):
        Image.open(folder / f"{name}.png").load()

    shown = 6 * (3 + 5) + 4 * (1 + 9) + 4 + 2
    page, text = check(folder / "index.html", shown)
    for row in result["rows"]:
        if (row["test"], row["predictor"], row["encoder"]) == ("quarter", "fitted", "trained"):
            assert f"{row['r2']:.2f}".replace("-", "\u2212") in page.text
    assert "un-normalised with the mean and deviation that were predicted" in page.text
    assert text.count(" *</figcaption>") == 4 * 8 and "<figcaption>centre</figcaption>" in text
    alts = [image["alt"] for image in page.all("img") if "reconstruction" in image["alt"]]
    assert len(alts) == len(set(alts)) == 4 * 9
    # Nothing moves before a reader asks for it.
    moving = [b"acTL" in base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', text)]
    unasked = re.sub(r"<details>.*?</details>", "", text, flags=re.S)
    still = [b"acTL" in base64.b64decode(data) for data in re.findall(r'"data:image/png;base64,([^"]+)"', unasked)]
    assert sum(moving) == 1 and sum(still) == 0
    embedded = re.search(r'download="analysis.csv" href="data:text/csv;base64,([^"]+)"', text)[1]
    assert base64.b64decode(embedded).decode() == (folder / "analysis.csv").read_text()


def test_a_run_without_a_and_b_is_analysed(tmp_path):
    """The learnt operator is tested on quarters alone, and the page says what a propagator without A and B lacks."""
    analyse_run(tmp_path, **{"heat.propagator": "cosine", "heat.init_scale": 0.0})
    result = json.loads((tmp_path / "analysis" / "analysis.json").read_text())
    assert {row["test"] for row in result["rows"] if row["predictor"] == "learnt"} == {"quarter"}
    assert set(result["operators"]) == {"fitted"} and result["drift"] == [] and result["animated"] == "cosine"
    assert not (tmp_path / "analysis" / "spread.png").exists()
    page, _ = check(tmp_path / "analysis" / "index.html", 6 * (3 + 5) + 4 * (1 + 9) + 4)
    assert "cosine has no A and B" in page.text


def test_reconstructions_at_placements_not_trained_on(analysed_run):
    """Trained ones are as they were; another is what the same maps and decoder make of the grid filled so."""
    model, images = api.load(analysed_run), np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    with pytest.raises(UserError, match="placement 0 was not trained on"):
        model.reconstruct(images, 0)
    anywhere = model.anywhere()
    np.testing.assert_array_equal(anywhere.reconstruct(images, 4), model.reconstruct(images, 4))
    # A visible block at the top left whose features are carried over half an image to the right.
    grid = anywhere.objective.continued(model.variables, images, np.zeros(2, np.int32))
    choice, params = model.objective.decoder.heat, model.variables["params"]["decoder"]["heat"]
    step = heat_lib.propagator(params, choice, "x", 1.0, 2)
    np.testing.assert_allclose(grid[:, :2, 2:], grid[:, :2, :2] @ step.T, atol=1e-4)
    odd = api.Model(
        config_tables.resolve({**ANALYSED, "image_size": 48, "quarter.placements": "corners"}), model.variables, 2
    )
    assert odd.anywhere().objective.decoder.placements == quarters.PLACEMENT_SETS["corners"]


@pytest.mark.parametrize("fields", [
    {}, {"heat.propagator": "spectral"}, {"heat.propagator": "cosine", "heat.init_scale": 0.0}, {"objective": "simmim"},
    {"encoder.name": "vit_micro", "encoder.position": "learnt", "encoder.grid": 2},
])  # fmt: skip
def test_pictures_while_it_trains(fields):
    fields = config_tables.resolve({**ANALYSED, **fields, "data.eval_split": ""})
    objective = methods.build(fields)
    batch = {"image": np.zeros((1, 32, 32, 3), np.uint8), "quarter": np.full(1, 4, np.int32)}
    shown = image_summaries.ImageSummaries(fields, objective)(jax.jit(objective.init)(rng.root(0), batch))
    sizes = {name: picture.shape for name, picture in shown.items()}
    assert all(picture.dtype == np.uint8 and picture.std() > 1 for picture in shown.values())
    rows, pair = 6 * 102 - 6, {"reconstructions": (6 * 102 - 6, 2 * 102 - 6, 3), "spectra": (480, 480, 3)}
    if fields.heat.propagator == "cosine":  # no A and B
        del pair["spectra"]
    if fields.objective == "simmim":
        assert sizes == {"features": (rows, 3 * 102 - 6, 3)}
    elif fields.encoder.position == "learnt":  # a table for crops, which encodes no whole image
        assert sizes == pair
    else:
        assert sizes == {**pair, "features": (rows, 5 * 102 - 6, 3)}


def test_the_report_takes_it(analysed_run):
    images = np.random.default_rng(1).integers(0, 256, (4, 32, 32, 3), np.uint8)
    path = report.write(analysed_run, images=report.Sample(images, tuple("abcd"), "test"))
    page, text = check(path, 4 * 4 + 3 + 6 * (3 + 5) + 4 * (1 + 9) + 4 + 2)
    assert 'href="#analysis"' in text and "put to the test" in page.text


def test_any_encoder_and_what_is_refused(tmp_path, capsys):
    one = ("--config.encoder.name", "pebble", "--config.image_size", "24", "--data", "synthetic:64")
    assert cli.main(["analyse", "--init", "random", "--workdir", str(tmp_path), *one]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "index.html")
    result = json.loads((tmp_path / "analysis.json").read_text())
    assert set(result["operators"]) == {"fitted"} and result["no_quarters"] == "a map of 3 x 3 cells has no quarter"
    page, _ = check(tmp_path / "index.html", 6 * 3)
    assert "has no quarter" in page.text

    small = ("--config.encoder.name", "pebble", "--config.image_size", "16", "--data", "synthetic:64")
    for init, more, words in (
        ("pixels", one, "--init pixels is not accepted"),
        ("random", small, "2 x 2 cells has no derivatives"),
        ("random", (), "brings no images"),
        (str(tmp_path), (), f"--init {tmp_path} is not accepted"),
    ):
        assert cli.main(["analyse", "--init", init, "--workdir", str(tmp_path / "no"), *more]) == 2
        assert words in capsys.readouterr().err
    with pytest.raises(UserError, match="holds no analysis"):
        analysis_page.write(tmp_path / "elsewhere")
