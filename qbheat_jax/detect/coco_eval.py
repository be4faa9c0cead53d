"""COCO's evaluation of boxes, by faster-coco-eval: the one room that knows it."""

import copy

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

    image_ids: the images that count. figures: by the names of FIGURES, fractions of 1, None where there is no box of that
    size; per_class: {name: AP}; curves: {name: precision at each of RECALLS, IoU 0.5}. A class without boxes is not in them.
    """
    package = library()
    known = package.COCO(copy.deepcopy(truth))
    run = package.COCOeval_faster(known, known.loadRes(copy.deepcopy(detections)), "bbox", print_function=_silent)
    run.params.imgIds = sorted(image_ids)
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


def _known(value):
    return None if value < 0 else float(value)


def _silent(*_):
    """The package reports its progress on stdout otherwise, which is for results."""
