"""Detection: targets and losses against plain numpy, AP against known cases, a frozen encoder, one device and eight."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qbheat_jax import api, cli, data, methods, pretrained, report
from qbheat_jax import config as config_lib
from qbheat_jax.data import annotations as lists
from qbheat_jax.data.sources.base import ArraySource
from qbheat_jax.errors import UserError
from qbheat_jax.eval import average_precision
from qbheat_jax.eval.evaluate import Evaluator
from qbheat_jax.methods import dense
from qbheat_jax.methods.common import detection
from qbheat_jax.models import pyramid
from qbheat_jax.ops import boxes as geometry
from qbheat_jax.report import detection_page as page_of
from qbheat_jax.tasks import detect
from qbheat_jax.train import config_tables, initial
from tests.batches import train_batches
from tests.conftest import interrupt_after_save, leave_one_device
from tests.test_analysis import check

SIZE = 32
GIVEN = {
    "init": "random", "data.source": "squares", "image_size": SIZE, "encoder.name": "pebble", "batch_size": 16,
    "total_steps": 4, "data.max_boxes": 3, "data.jitter": (1.0, 1.0), "dense.strides": (8, 16), "dense.width": 16,
    "dense.depth": 1, "detector.count": 10, "learning_rate": 0.2, "log_every": 1, "checkpoint_every": 2, "eval_every": 2,
    "adam_b2": 0.9,
}  # fmt: skip


class Squares(ArraySource):
    """Red and green squares of 12 pixels on black, up to two of them, some images without any."""

    boxed = plain = True

    def __init__(self, broken=()):
        super().__init__("squares", {"train": 32, "val": 19}, ["red", "green"])
        self._images, self._boxes, self._broken = {}, {}, broken
        generator = np.random.default_rng(0)
        for split, n in self.splits.items():
            images, found = np.zeros((n, SIZE, SIZE, 3), np.uint8), []
            for k in range(n):
                corners, classes = [], []
                for slot in np.flatnonzero(generator.random(2) < 0.7):
                    y, x = generator.integers(0, SIZE - 12), generator.integers(0, 4) + 16 * slot
                    kind = int(generator.integers(2))
                    images[k, y : y + 12, x : x + 12, kind] = 255
                    corners.append([x, y, x + 12, y + 12])
                    classes.append(kind)
                found.append(
                    lists.Boxes(
                        np.array(corners, np.float32).reshape(-1, 4),
                        np.array(classes, np.int32),
                        np.zeros(len(classes), bool),
                        (SIZE, SIZE),
                    )  # fmt: skip
                )
            self._images[split], self._boxes[split] = images, found

    def images(self, split):
        return self._images[split]

    def labels(self, split):
        return np.full(self.splits[split], -1, np.int32)

    def fetch(self, split, index):
        if index in self._broken:
            raise OSError(5, "damaged", f"{split}[{index}]")
        return super().fetch(split, index)

    def boxes(self, split, index):
        return self._boxes[split][index]

    def annotations(self, split):
        found = [
            {
                "image_id": 50 + n, "category_id": 3 + int(c), "bbox": [*b[:2].tolist(), *(b[2:] - b[:2]).tolist()],
                "area": 144.0, "iscrowd": 0,
            }
            for n, own in enumerate(self._boxes[split]) for b, c in zip(own.corners, own.classes)
        ]  # fmt: skip
        return {
            "images": [{"id": 50 + n, "width": SIZE, "height": SIZE} for n in range(self.splits[split])],
            "annotations": [{"id": n + 1, **a} for n, a in enumerate(found)],
            "categories": [{"id": 3 + c, "name": name} for c, name in enumerate(self.class_names)],
        }


def config(**fields):
    return config_lib.resolve({**GIVEN, **{k.replace("__", "."): v for k, v in fields.items()}}, config_tables.DETECT)


@pytest.fixture(autouse=True)
def squares(monkeypatch):
    monkeypatch.setattr(data, "open_source", lambda *a, **k: Squares())


def perfect(truth, shift=0.0):
    return [
        {
            **{key: a[key] for key in ("image_id", "category_id")},
            "score": 0.9,
            "bbox": [a["bbox"][0] + shift, *a["bbox"][1:]],
        }
        for a in truth["annotations"]
    ]


# --- AP --------------------------------------------------------------------------------------------------------------


def test_ap_of_known_detections():
    truth = Squares().annotations("val")
    images = [image["id"] for image in truth["images"]]
    before = json.dumps(truth)
    figures, per_class, curves = average_precision.measure(truth, perfect(truth), images)
    assert figures == {"AP": 1.0, "AP50": 1.0, "AP75": 1.0, "APs": 1.0, "APm": None, "APl": None}
    assert per_class == {"red": 1.0, "green": 1.0} and curves["red"] == [1.0] * len(average_precision.RECALLS)
    assert average_precision.measure(truth, [], images)[0]["AP"] == 0.0
    # Moved by 3 of 12 pixels the IoU is 9 / 15 = 0.6: right at the thresholds 0.5, 0.55 and 0.6 of the ten.
    figures, _, _ = average_precision.measure(truth, perfect(truth, 2.9), images)
    assert figures["AP50"] == pytest.approx(1.0) and figures["AP"] == pytest.approx(0.3) and figures["AP75"] == 0.0
    assert json.dumps(truth) == before, "what is given is left alone"


@pytest.mark.parametrize("first", [0, 1, 7])
@pytest.mark.parametrize("count", [2, 8])
def test_perfect_detections_have_ap_1_whatever_the_ids(first, count):
    """An annotation of id 0 is no unmatched one; ids of images and categories may be 0, large or texts."""
    for number, kind in ((lambda n: n, 0), (lambda n: f"image {n}", "kind"), (lambda n: 2**40 + n, 2**41)):
        truth = {
            "images": [{"id": number(n), "width": 32, "height": 32} for n in range(count)],
            "categories": [{"id": kind, "name": "square"}],
            "annotations": [
                {
                    "id": first + n,
                    "image_id": number(n),
                    "category_id": kind,
                    "bbox": [n, n, 9, 9],
                    "area": 81,
                    "iscrowd": 0,
                }
                for n in range(count)
            ],
        }
        figures, per_class, _ = average_precision.measure(truth, perfect(truth), [number(n) for n in range(count)])
        assert figures["AP"] == 1.0 and per_class == {"square": 1.0}


def test_images_that_were_not_seen_do_not_count_and_crowds_are_forgiven():
    truth = Squares().annotations("val")
    images = [image["id"] for image in truth["images"]]
    half = [d for d in perfect(truth) if d["image_id"] in images[:9]]
    assert average_precision.measure(truth, half, images[:9])[0]["AP"] == 1.0
    assert average_precision.measure(truth, half, images)[0]["AP"] < 0.7
    crowd = {"id": 999, "image_id": images[0], "category_id": 3, "bbox": [0, 0, 32, 32], "area": 1024, "iscrowd": 1}
    many = [{"image_id": images[0], "category_id": 3, "score": 1.0, "bbox": [20, k, 5, 5]} for k in range(9)]
    assert average_precision.measure(truth, [*perfect(truth), *many], images)[0]["AP"] < 0.9
    truth["annotations"].append(crowd)
    assert average_precision.measure(truth, [*perfect(truth), *many], images)[0]["AP"] == 1.0


# --- Targets and losses ------------------------------------------------------------------------------------------------


def plain_assign(points, strides, boxes, classes, levels):
    index = np.full(len(points), -1)
    for p, ((x, y), stride) in enumerate(zip(points, strides)):
        best = np.inf
        for n, ((x0, y0, x1, y1), c) in enumerate(zip(boxes, classes)):
            side = max(x1 - x0, y1 - y0)
            level = next((s for s in levels[:-1] if side <= dense.REACH * s), levels[-1])
            away = max(abs(x - (x0 + x1) / 2), abs(y - (y0 + y1) / 2))
            near = away < dense.RADIUS * stride and x0 < x < x1 and y0 < y < y1
            if c >= 0 and level == stride and (near or away <= stride / 2) and (x1 - x0) * (y1 - y0) < best:
                best, index[p] = (x1 - x0) * (y1 - y0), n
    return index


def test_cells_are_assigned_as_a_plain_loop_does_it():
    generator, levels = np.random.default_rng(0), (4, 8, 16)
    points, strides = pyramid.locations(64, 64, levels)
    assert len(points) == 256 + 64 + 16 and points[0].tolist() == [2, 2] and points[-1].tolist() == [56, 56]
    found = 0
    for turn in range(20):
        low = generator.integers(0, 40, (6, 2))  # whole numbers: ties of all kinds
        boxes = np.concatenate([low, low + generator.integers(1, 60, (6, 2))], -1).astype(np.float32)
        classes = np.where(np.arange(6) < turn % 7, 1, -1)
        expected = plain_assign(points, strides, boxes, classes, levels)
        np.testing.assert_array_equal(dense.assign(points, strides, boxes, jnp.asarray(classes), levels), expected)
        found += len(set(expected)) - 1
    assert found > 30


def test_focal_losses_are_their_formulas():
    generator = np.random.default_rng(0)
    logits = generator.normal(0, 3, (5, 7)).astype(np.float32)
    probability, binary = 1 / (1 + np.exp(-logits)), generator.integers(0, 2, (5, 7))
    right = np.where(binary, probability, 1 - probability)
    expected = -np.where(binary, 0.25, 0.75) * (1 - right) ** 2 * np.log(right)
    np.testing.assert_allclose(detection.focal(logits, binary), expected, rtol=1e-4)
    quality = generator.uniform(0, 1, (5, 7)).astype(np.float32)
    entropy = -(quality * np.log(probability) + (1 - quality) * np.log(1 - probability))
    np.testing.assert_allclose(
        detection.quality_focal(logits, quality), (probability - quality) ** 2 * entropy, rtol=1e-4
    )


def built(**fields):
    return methods.build(pretrained.with_fields(config(**fields), {"detector.classes": 2}, config_tables.DETECT))


def first_batch(count=16):
    return next(train_batches(Squares(), split="train", batch_size=count, image_size=SIZE, seed=0, flip=False, boxes=3))


@pytest.fixture(scope="module")
def born():
    objective = built()
    return objective, jax.jit(objective.init)(jax.random.key(0), first_batch())


def test_the_loss_by_hand(born):
    objective, variables = born
    batch = first_batch(4)
    params, stats, images = variables["params"], variables["batch_stats"], objective.pixels.normalise(batch["image"])
    logits, found = jax.jit(objective._outputs)(params, stats, images)
    points, strides = pyramid.locations(SIZE, SIZE, (8, 16))
    quality, box, cells = np.zeros(logits.shape), 0.0, 0
    for k in range(4):
        index = plain_assign(points, strides, batch["boxes"][k], batch["classes"][k], (8, 16))
        for p in np.flatnonzero(index >= 0):
            wanted = batch["boxes"][k][index[p]]
            quality[k, p, batch["classes"][k][index[p]]] = geometry.iou(found[k, p], wanted)
            box += 1 - float(geometry.giou(found[k, p], wanted))
            cells += 1
    expected = (np.asarray(detection.quality_focal(logits, quality)).sum() + 2 * box) / cells
    loss_of = jax.jit(lambda batch: objective.loss(params, stats, batch, None))
    loss, (_, metrics) = loss_of(batch)
    assert float(loss) == pytest.approx(expected, rel=1e-5) and float(metrics["cells"]) == cells / 4
    # An image that does not count, whatever is in it, and images without any box.
    masked = {**batch, "mask": np.array([True, True, True, False])}
    other = {**masked, "image": np.where(np.arange(4)[:, None, None, None] < 3, batch["image"], 77).astype(np.uint8)}
    losses = [loss_of(b)[0] for b in (masked, other)]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-6)
    empty = {**batch, "classes": np.full_like(batch["classes"], -1)}
    assert np.isfinite(loss_of(empty)[0])


def test_no_gradient_reaches_a_frozen_encoder(born):
    _, variables = born
    for tune in (False, True):
        objective = built(tune=tune)
        gradient = jax.jit(jax.grad(lambda p: objective.loss(p, variables["batch_stats"], first_batch(), None)[0]))
        norms = jax.tree.map(lambda g: float(jnp.abs(g).max()), gradient(variables["params"]))
        assert any(n > 0 for n in jax.tree.leaves(norms["encoder"])) == tune
        assert all(n > 0 for n in jax.tree.leaves(norms["detector"]["pyramid"]["smooth8"]))


def test_a_pyramid_of_any_maps():
    features, stem = jnp.ones((1, 4, 4, 6)), jnp.ones((1, 16, 16, 5))
    out = {"stem": jnp.zeros_like(stem), "block1": stem, "tokens": jnp.ones((1, 3, 8)), "last": features}
    found = pyramid.maps(features, out, 64, True)
    assert set(found) == {4, 16} and (found[4] == 1).all() and set(pyramid.maps(features, out, 64, False)) == {16}
    for strides in ((8, 16, 32), (4, 8), (32,)):
        make = pyramid.Pyramid(strides, 8).init_with_output
        levels, _ = jax.eval_shape(make, jax.random.key(0), found)
        assert [x.shape for x in levels] == [(1, 64 // s, 64 // s, 8) for s in strides]


# --- Runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(workdir, result) of a run that is long enough to find something."""
    workdir = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        leave_one_device(patch)
        patch.setattr(data, "open_source", lambda *a, **k: Squares())
        fields = dict(total_steps=150, checkpoint_every=150, eval_every=50, log_every=25)
        return workdir, detect.run(config(**fields), workdir), config(**fields)


def test_it_learns_with_an_encoder_that_stays_what_it_was(trained, capsys):
    workdir, result, fields = trained
    assert result["AP50"] > 0.5 and result["n"] == 19 and result["step"] == 150 and result["frozen"]
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < 0.6 * losses[0]
    assert [line["val/AP50"] for line in lines if "val/AP50" in line][-1] == result["AP50"]
    model = api.load(workdir)
    make = initial.in_one_draw(lambda key: model.objective.init(key, first_batch()))
    first = jax.jit(make)(_born_with(fields))
    jax.tree.map(np.testing.assert_array_equal, model.encoder_variables["params"], first["params"]["encoder"])
    jax.tree.map(np.testing.assert_array_equal, model.encoder_variables["batch_stats"], first["batch_stats"]["encoder"])
    assert detect.run(fields, workdir) == result, "a finished run is left alone"
    with pytest.raises(UserError, match="has no classifier"):
        model.logits(Squares().images("val")[:2])


def _born_with(fields):
    from qbheat_jax import rng

    return rng.fold(rng.root(fields.seed), "init")


def test_what_was_found_is_written_as_coco_has_it(trained):
    workdir, result, _ = trained
    found, truth = json.loads((workdir / "detections.json").read_text()), Squares().annotations("val")
    assert set(found[0]) == {"image_id", "category_id", "bbox", "score"}
    assert {d["image_id"] for d in found} <= {image["id"] for image in truth["images"]}
    figures, per_class, _ = average_precision.measure(truth, found, [image["id"] for image in truth["images"]])
    assert figures["AP"] == result["AP"] and per_class == result["per_class"]


def test_its_page(trained, monkeypatch):
    workdir, result, _ = trained
    monkeypatch.setattr(data, "open_source", lambda *a, **k: Squares())
    page, text = check(report.write(workdir), 0)
    assert f"{100 * result['AP50']:.1f}" in page.text
    assert len(page.all("image")) == 12 and all(a["href"].startswith("data:image/png") for a in page.all("image"))
    drawn = [attributes for attributes in page.all("rect") if attributes.get("class") == "true"]
    shown = [len(Squares().boxes("val", n).corners) for n in np.random.default_rng(result["seed"]).permutation(19)[:12]]
    assert len(drawn) == sum(shown) > 0
    # Of the surest detections, as many as there are squares: what is called right is what COCO calls right.
    right = sum(attributes.get("class") == "right" for attributes in page.all("rect"))
    assert right > 0.4 * sum(shown)
    monkeypatch.setattr(data, "open_source", gone)
    page, text = check(report.write(workdir), 0)
    assert "There are no pictures: it is gone" in page.text and not page.all("image")


def gone(*_, **__):
    raise UserError("it is gone")


def test_what_a_page_calls_right():
    def one(kind, *box):
        return {"category_id": kind, "bbox": list(box)}

    known = [one(1, 0, 0, 10, 10), one(1, 20, 0, 10, 10)]
    assert page_of.judged([one(1, 0, 0, 10, 10), one(1, 1, 0, 10, 10)], known) == [True, False], (
        "a true box is taken once"
    )
    assert page_of.judged([one(2, 0, 0, 10, 10)], known) == [False], "of another class"
    assert page_of.judged([one(1, 0, 0, 10, 5), one(1, 20, 0, 10, 4.9)], known) == [True, False], "one half, and less"
    assert page_of.judged([one(1, 0, 0, 1, 1)], []) == [False] and page_of.judged([], known) == []


def evaluator_of(model, source, fields):
    metric = average_precision.AveragePrecision(model.objective, source, "val")
    return Evaluator.of_run(metric, source, "val", fields)


@pytest.mark.parametrize("count, batch", [(8, 16), (4, 7)])
def test_ap_does_not_depend_on_devices_or_batch(trained, monkeypatch, count, batch):
    workdir, result, fields = trained
    chosen = jax.local_devices()[:count]
    monkeypatch.setattr(jax, "devices", lambda *a: chosen)
    model = api.load(workdir)
    evaluator = evaluator_of(
        model, Squares(), pretrained.with_fields(fields, {"batch_size": batch}, config_tables.DETECT)
    )
    figures = evaluator(model.variables)
    assert figures["val/AP"] == pytest.approx(result["AP"], abs=1e-3) and evaluator.measured.n == 19
    assert "val/APl" not in figures and evaluator.measured.figures["APl"] is None


def test_images_that_cannot_be_read_do_not_count(trained):
    workdir, _, fields = trained
    model = api.load(workdir)
    fields = pretrained.with_fields(fields, {"data.max_bad_fraction": 0.2}, config_tables.DETECT)
    evaluator = evaluator_of(model, Squares(broken=(0, 7)), fields)
    evaluator(model.variables)
    found = {d["image_id"] for d in evaluator.measured.details["detections"]}
    assert evaluator.measured.n == 17 and evaluator.measured.skipped == 2 and found and not {50, 57} & found


def losses_of(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def test_sharded_is_unsharded_and_resumed_is_uninterrupted(tmp_path, monkeypatch):
    everything, unmeasured = jax.devices(), {"data__eval_split": ""}
    for count in (1, 8):
        monkeypatch.setattr(jax, "devices", lambda *a, count=count: everything[:count])
        monkeypatch.setattr(jax, "local_devices", lambda *a, count=count: everything[:count])
        detect.run(config(**unmeasured), tmp_path / str(count))
    expected, got = losses_of(tmp_path / "1"), losses_of(tmp_path / "8")
    np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=1e-4)

    monkeypatch.setattr(jax, "devices", lambda *a: everything[:1])
    monkeypatch.setattr(jax, "local_devices", lambda *a: everything[:1])
    again = functools.partial(detect.run, config(**unmeasured), tmp_path / "again")
    interrupt_after_save(monkeypatch, detect.loop.Checkpoints, 2, again)
    again()
    assert losses_of(tmp_path / "again") == expected
    whole, resumed = (api.load(tmp_path / name).variables for name in ("1", "again"))
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)


def test_it_starts_from_the_encoder_of_a_workdir(trained, tmp_path, one_device):
    given = dict(init=str(trained[0]), encoder__name="", image_size=0, total_steps=1, data__eval_split="")
    result = detect.run(config(**given), tmp_path)
    before, after = api.load(trained[0]), api.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, before.encoder_variables, after.encoder_variables)
    assert result["encoder"] == "pebble" and result["image_size"] == SIZE and "AP" not in result
    assert "not measured" in detect.line(result) and not (tmp_path / "detections.json").exists()


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"init": ""}, "init='' is not accepted"),
        ({"image_size": 40}, "image_size=40 is not accepted: it takes a multiple of the largest of dense.strides"),
        ({"dense__strides": (8, 32)}, r"dense.strides=\(8, 32\) is not accepted: it takes powers of two"),
        ({"dense__width": 20}, "dense.width=20 is not accepted"),
        ({"batch_size": 64}, "32 images in train to train on, fewer than batch_size=64"),
        ({"data__eval_split": "test"}, "data.eval_split='test' is not accepted"),
        ({"detector__classes": 5}, "squares has 2 classes"),
    ],
)
def test_what_cannot_be_is_one_sentence(tmp_path, fields, words):
    with pytest.raises(UserError, match=words) as caught:
        detect.run(config(**fields), tmp_path / "w")
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    assert not (tmp_path / "w").exists()


def test_images_without_boxes_and_a_missing_evaluator_are_refused(tmp_path, monkeypatch):
    monkeypatch.undo()
    with pytest.raises(UserError, match="'synthetic' has no boxes: detection takes coco:"):
        detect.run(config(data__source="synthetic"), tmp_path / "w")
    monkeypatch.setattr(data, "open_source", lambda *a, **k: Squares())
    monkeypatch.setitem(__import__("sys").modules, "faster_coco_eval", None)
    with pytest.raises(UserError, match=r"pip install 'qbheat_jax\[detect\]'"):
        detect.run(config(), tmp_path / "w")


def test_the_command(tmp_path, capsys):
    path = tmp_path / "recipe.py"
    path.write_text(f"def get_config():\n    return { {k: v for k, v in GIVEN.items() if k != 'init'}!r}\n")
    command = ["detect", "--config", str(path), "--init", "random", "--workdir", str(tmp_path / "w")]
    assert cli.main([*command, "--config.total_steps", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 19
    assert cli.main([*command, "--config.dense.depth", "-1"]) == 2
    assert "dense.depth=-1" in capsys.readouterr().err
    assert cli.main(["report", "--workdir", str(tmp_path / "w")]) == 0
    assert (tmp_path / "w" / "report" / "index.html").is_file()
    (tmp_path / "w" / "curves.json").write_text("{")  # torn
    assert cli.main(["report", "--workdir", str(tmp_path / "w")]) == 2
    told = capsys.readouterr().err
    assert f"--workdir {tmp_path / 'w'} " in told and "AP" in told
