"""COCO's evaluation of boxes, by faster-coco-eval: the one room that knows it."""

import numpy as np

from qbheat_jax.errors import UserError

# Detections an image that COCO's AP looks at.
MOST = 100
# What it is called and where COCO's summary has it.
FIGURES = {"AP": 0, "AP50": 1, "AP75": 2, "APs": 3, "APm": 4, "APl": 5}
# Recall at which precision is taken.
RECALLS = np.linspace(0, 1, 101)


def library():
    """The evaluator's package. Raises UserError where it is missing."""
    try:
        import faster_coco_eval
    except ImportError as error:
        raise UserError(f"AP is measured by faster-coco-eval ({error}): pip install 'qbheat_jax[detect]'") from error
    return faster_coco_eval


def measure(truth, detections, image_ids):
    """(figures, per_class, curves) of detections in COCO's result format against `truth`, a dict in COCO's format.

    Ids may be anything: the evaluator, which takes an annotation's id 0 for "not matched" and wants numbers, gets its own.

    image_ids: the images that count. figures: by the names of FIGURES, fractions of 1, None where there is no box of that
    size; per_class: {name: AP}; curves: {name: precision at each of RECALLS, IoU 0.5}. A class without boxes is not in them.
    """
    package = library()
    images = {image["id"]: n for n, image in enumerate(truth["images"], 1)}
    classes = {category["id"]: n for n, category in enumerate(truth["categories"], 1)}
    known = package.COCO(_renumbered(truth, images, classes))
    found = [{**d, "image_id": images[d["image_id"]], "category_id": classes[d["category_id"]]} for d in detections]
    run = package.COCOeval_faster(known, known.loadRes(found), "bbox", print_function=_silent)
    run.params.imgIds = sorted(images[number] for number in image_ids)
    run.evaluate()
    run.accumulate()
    run.summarize()
    figures = {name: _known(run.stats[place]) for name, place in FIGURES.items()}
    precision = np.asarray(run.eval["precision"])[..., 0, -1]  # [IoU, recall, class], of all sizes, MOST an image
    per_class, curves = {}, {}
    for place, number in enumerate(run.params.catIds):
        name = known.cats[number]["name"]
        values = precision[:, :, place]
        if (values > -1).any():
            per_class[name] = float(values[values > -1].mean())
            curves[name] = np.maximum(values[0], 0.0).tolist()
    return figures, per_class, curves


def _renumbered(truth, images, classes):
    """The same truth with ids that count from 1, and of the fields that the evaluator reads alone."""
    annotations = [
        {
            "id": n,
            "image_id": images[a["image_id"]],
            "category_id": classes[a["category_id"]],
            "bbox": list(a["bbox"]),
            "area": a["area"],
            "iscrowd": int(a.get("iscrowd") or 0),
        }
        for n, a in enumerate(truth["annotations"], 1)
    ]
    return {
        "images": [{"id": n, "width": i["width"], "height": i["height"]} for n, i in enumerate(truth["images"], 1)],
        "categories": [{"id": n, "name": c["name"]} for n, c in enumerate(truth["categories"], 1)],
        "annotations": annotations,
    }


def _known(value):
    return None if value < 0 else float(value)


def _silent(*_):
    """The package reports its progress on stdout otherwise, which is for results."""
