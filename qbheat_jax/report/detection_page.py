"""The page of a detector: write one self-contained HTML file from the workdir of `qbheat detect`."""

import pathlib

import numpy as np

from qbheat_jax import api, data
from qbheat_jax.data import decode
from qbheat_jax.data.specs import image as image_lib
from qbheat_jax.errors import UserError
from qbheat_jax.ops import boxes as boxes_lib
from qbheat_jax.report import charts, environment, load_run, text, tiles
from qbheat_jax.report.template import save, template
from qbheat_jax.train import metrics
from qbheat_jax.train.config_tables import DETECT

# Images shown, and the longest side at which a page keeps one.
SHOWN, LONGEST = 12, 480
# A detection is right where it names the class of a true box and their IoU is at least this.
RIGHT = 0.5


def write(workdir):
    """Write WORKDIR/report/index.html and return its path. Raise UserError where the detector has no AP yet."""
    workdir = pathlib.Path(workdir)
    return save(workdir / "report" / "index.html", template("detection.html.j2").render(_context(workdir)))


def _context(workdir):
    """Return the variables of the template."""
    config = api.read_config(workdir)
    found = {name: load_run.read_json(workdir / f"{name}.json") for name in ("result", "detections", "curves")}
    result = found["result"]
    if not result or "AP" not in result or found["detections"] is None or found["curves"] is None:
        raise UserError(
            f"--workdir {workdir} holds a detector without AP: let qbheat detect run to its end with data.eval_split set"
        )
    cards, no_images, counts = [], "", {}
    try:
        source = data.open_source(config.data.source, image_size=config.image_size, tfds_dir=config.data.tfds_dir)
        truth = source.annotations(config.data.eval_split)
        cards, counts = _cards(source, config, truth, found["detections"]), _counts(truth)
    except UserError as error:  # the page may be written on a machine without the data
        no_images = str(error)
    lines = metrics.read(workdir)
    split = config.data.eval_split
    measured = {name: load_run.series(lines, f"{split}/{name}") for name in ("AP", "AP50", "AP75")}
    loss, rate = (load_run.series(lines, f"train/{name}") for name in ("loss", "learning_rate"))
    nothing = ([], [])
    return {
        "result": result,
        "split": split,
        "encoder": load_run.BASELINES.get(result["init"], f"the encoder of {load_run.shown(result['init'])}"),
        "headlines": [
            (text.percent(result["AP"]), "AP, COCO\u2019s mean over overlaps from 0.5 to 0.95"),
            (text.percent(result["AP50"]), "AP50: an overlap of 0.5 is right"),
            (text.percent(result["AP75"]), "AP75: an overlap of 0.75 is right"),
        ],
        "sizes": [(name, result[key]) for name, key in (("small", "APs"), ("medium", "APm"), ("large", "APl"))],
        "cards": cards,
        "no_images": no_images,
        "losses": charts.losses(loss, nothing, nothing, rate),
        "learning": charts.precisions(measured) if len(measured["AP"][0]) > 1 else None,
        "curves": charts.recalls(found["curves"]) if found["curves"] else None,
        "classes": [
            (name, counts.get(name), value, float(np.mean(found["curves"][name])))
            for name, value in result["per_class"].items()
        ],
        "command": load_run.typed(result["command"], workdir),
        "shown": load_run.shown(workdir),
        "versions": environment.versions(),
        "fields": environment.fields(config, DETECT),
    }


def _counts(truth):
    """Return {class name: number of its boxes in the split}."""
    names = {one["id"]: one["name"] for one in truth["categories"]}
    counts = dict.fromkeys(names.values(), 0)
    for one in truth["annotations"]:
        counts[names[one["category_id"]]] += 1
    return counts


def _cards(source, config, truth, detections):
    """Return the cards of images drawn by the run's seed, with their true boxes and detections."""
    split, cards = config.data.eval_split, []
    names = {one["id"]: one["name"] for one in truth["categories"]}
    order = np.random.default_rng(config.seed).permutation(len(truth["images"]))
    for index in order.tolist():
        if len(cards) == SHOWN:
            break
        image = truth["images"][index]
        try:
            pixels, _, _ = source.fetch(split, index)
            pixels = image_lib.pixels(pixels, (image["height"], image["width"]))
        except (OSError, decode.BadImage):
            continue  # skipped in the measuring too
        known = [a for a in truth["annotations"] if a["image_id"] == image["id"] and not a.get("iscrowd")]
        own = sorted((d for d in detections if d["image_id"] == image["id"]), key=lambda d: -d["score"])
        chosen = own[: len(known)]
        right = judged(chosen, known)
        cards.append(
            {
                "picture": tiles.data_uri(pixels, LONGEST),
                "width": image["width"],
                "height": image["height"],
                "true": [a["bbox"] for a in known],
                "found": [
                    {"box": d["bbox"], "right": ok, "label": f"{names[d['category_id']]} {d['score']:.2f}"}
                    for d, ok in zip(chosen, right)
                ],
                "count": len(known),
                "right": sum(right),
                "surest": own[0]["score"] if own else 0.0,
            }
        )
    return cards


def judged(detections, known):
    """Return which detections of an image are right, a list of bools.

    Detections are in COCO's format, the most confident first. Each takes the free true box of its class that it overlaps
    most, and is right where their IoU is at least RIGHT.
    """
    ours, theirs = (_corners(boxes) for boxes in (detections, known))
    overlap = np.array(boxes_lib.iou(ours[:, None], theirs[None]))
    classes = [np.array([one["category_id"] for one in boxes], int) for boxes in (detections, known)]
    overlap[classes[0][:, None] != classes[1]] = 0.0
    right = []
    for row in overlap:
        right.append(bool(row.max(initial=0.0) >= RIGHT))
        if right[-1]:
            overlap[:, row.argmax()] = 0.0
    return right


def _corners(boxes):
    """Return the corners float32 [n, 4] of COCO's (left, top, width, height)."""
    boxes = np.array([one["bbox"] for one in boxes], np.float32).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], -1)
