"""Average precision of detections as COCO defines it, by faster-coco-eval; nothing else imports that package."""

import jax.numpy as jnp
import numpy as np

from qbheat_jax.errors import UserError
from qbheat_jax.eval.evaluate import Metric

# Figures by name, and their places in COCO's summary.
FIGURES = {"AP": 0, "AP50": 1, "AP75": 2, "APs": 3, "APm": 4, "APl": 5}
# Recalls at which precision is taken.
RECALLS = np.linspace(0, 1, 101)


class AveragePrecision(Metric):
    """AP of a detector on whole images, their longer side scaled to image_size.

    Details: "per_class" and "curves" (rounded) as `measure` returns them, and "detections" in COCO's result format, in
    pixels of the original images.
    """

    name, headline = "average precision", "AP"
    quoted = ("AP", "AP50", "AP75")
    inputs = ("image", "index", "scale", "mask")

    def __init__(self, objective, source, split):
        """Prepare the metric.

        Args:
          objective: A method with `detections` and `pixels`.
          source: Of `data.open_source`, with boxes.
          split: Its split's name.

        Raises:
          UserError: faster-coco-eval is not installed.
        """
        library()  # before hours of training
        self._objective, self._source, self._split = objective, source, split

    def sums(self, variables, batch):
        """Return "n" and, for each image, "index", "mask", "scale" and its `Detection.detections`."""
        images = self._objective.pixels.normalise(batch["image"])
        boxes, scores, classes = self._objective.detections(variables, images)
        rows = {name: batch[name] for name in ("index", "mask", "scale")}
        return {"n": jnp.sum(batch["mask"]), **rows, "boxes": boxes, "scores": scores, "classes": classes}

    def add(self, total, sums):
        """Collect the batches' rows in a list."""
        return [*(total or ()), sums]

    def figures(self, total):
        truth = self._source.annotations(self._split)
        rows = {name: np.concatenate([part[name] for part in total]) for name in total[0] if name != "n"}
        shown = np.flatnonzero(rows["mask"])
        detections = [found for row in shown for found in _results(rows, row, truth)]
        images = [truth["images"][rows["index"][row]]["id"] for row in shown]
        figures, per_class, curves = measure(truth, detections, images)
        curves = {name: [round(p, 4) for p in values] for name, values in curves.items()}
        return figures, {"per_class": per_class, "curves": curves, "detections": detections}


METRIC = AveragePrecision


def library():
    """Return the package faster_coco_eval. Raise UserError where it is not installed."""
    try:
        import faster_coco_eval
    except ImportError as error:
        raise UserError(f"AP is measured by faster-coco-eval ({error}): pip install 'qbheat_jax[detect]'") from error
    return faster_coco_eval


def measure(truth, detections, image_ids):
    """Evaluate detections as COCO does.

    Ids may be of any type: the package is given its own. It takes integers alone, and the annotation id 0 for "not
    matched".

    Args:
      truth: Dict in COCO's format.
      detections: List in COCO's result format.
      image_ids: Of the images that count.

    Returns:
      figures: By the names of FIGURES; fractions, or None where no box has that size.
      per_class: {name: AP}, without classes that have no box.
      curves: {name: list of the precision at each of RECALLS, at IoU 0.5}, likewise.

    Raises:
      UserError: faster-coco-eval is not installed.
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
    # [IoU, recall, class], over boxes of all sizes and 100 detections an image.
    precision = np.asarray(run.eval["precision"])[..., 0, -1]
    per_class, curves = {}, {}
    for place, number in enumerate(run.params.catIds):
        name = known.cats[number]["name"]
        values = precision[:, :, place]
        if (values > -1).any():
            per_class[name] = float(values[values > -1].mean())
            curves[name] = np.maximum(values[0], 0.0).tolist()
    return figures, per_class, curves


def _renumbered(truth, images, classes):
    """Return the truth with ids from 1 on, reduced to the fields that the package reads."""
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
    """Swallow the package's progress report; stdout is for results."""


def _results(rows, row, truth):
    """Yield the detections of one image in COCO's result format. Score 0 marks padding."""
    image = truth["images"][rows["index"][row]]
    down, right = rows["scale"][row]
    corners = rows["boxes"][row] / np.array([right, down, right, down])
    # Boxes are clipped to the image, since the batch shows it padded.
    corners = np.clip(corners, 0, np.array([image["width"], image["height"]] * 2))
    for (x0, y0, x1, y1), score, kind in zip(corners.tolist(), rows["scores"][row].tolist(), rows["classes"][row]):
        if score > 0 and x1 > x0 and y1 > y0:
            yield {
                "image_id": image["id"],
                "category_id": truth["categories"][kind]["id"],
                "bbox": [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)],
                "score": round(score, 5),
            }
