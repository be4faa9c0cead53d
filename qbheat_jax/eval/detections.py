"""Average precision of a detector over a split: a pmap loop over its images, then COCO's evaluation."""

import jax
import numpy as np
from jax.experimental import multihost_utils

from qbheat_jax import data
from qbheat_jax.errors import UserError
from qbheat_jax.eval import average_precision
from qbheat_jax.probe.pmap import pmap, pmap_batches


class AveragePrecision:
    """An evaluator: every image of the split once, whole, its longer side scaled to image_size.

    Once it has run: `figures` {"AP", "AP50", "AP75", "APs", "APm", "APl"}, None where there is nothing of that size,
    `per_class` {name: AP}, `curves` (see `coco_eval.measure`), `detections` in COCO's result format, in pixels of the
    original images, and `n`, the images that could be read.
    """

    def __init__(self, objective, source, split, config):
        average_precision.library()  # that it is missing is to be known before hours of training
        self._source, self._split, self._config = source, split, config
        self._mapped = pmap(lambda variables, x: objective.detections(variables, objective.pixels.normalise(x)))
        self.figures, self.per_class, self.curves, self.detections, self.n = {}, {}, {}, [], 0

    def __call__(self, variables):
        """-> {"SPLIT/AP": ..., "SPLIT/AP50": ...}."""
        rows = self._rows(variables)
        truth = self._source.annotations(self._split)
        images = [image["id"] for image in truth["images"]]
        shown = np.flatnonzero(rows["mask"])
        if not len(shown):
            raise UserError(f"data.source={self._source.spec!r} split {self._split!r} has no image that can be read")
        self.n = len(shown)
        self.detections = [d for row in shown for d in _results(rows, row, truth)]
        measured = average_precision.measure(truth, self.detections, [images[rows["index"][row]] for row in shown])
        self.figures, self.per_class, self.curves = measured
        return {f"{self._split}/{name}": value for name, value in self.figures.items() if value is not None}

    def _rows(self, variables):
        """{"index", "mask", "scale", "boxes", "scores", "classes"} of every row of every process's batches."""
        source, config = self._source, self._config
        batches = data.eval_batches(
            source,
            split=self._split,
            batch_size=-(-config.batch_size // jax.process_count()) * jax.process_count(),
            image_size=config.image_size,
            seed=config.seed,
            boxes=config.data.max_boxes,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=config.data.workers,
            prefetch=config.data.prefetch,
            bad=data.BadFiles(config.data.max_bad_fraction, source.splits[self._split]),
        )
        kept = {"index": [], "mask": [], "scale": []}

        def inputs():
            for batch in batches:
                for name, arrays in kept.items():
                    arrays.append(batch[name])
                yield (
                    batch["image"],
                    np.ones(len(batch["mask"]), bool),
                )  # all of them, so that processes have equal shapes

        try:
            found = list(pmap_batches(self._mapped, variables, inputs()))
        finally:
            batches.close()
        rows = {**kept, **dict(zip(("boxes", "scores", "classes"), map(list, zip(*found))))}
        rows = {name: np.concatenate(arrays) for name, arrays in rows.items()}
        if jax.process_count() > 1:
            rows = {name: x.reshape(-1, *x.shape[2:]) for name, x in multihost_utils.process_allgather(rows).items()}
        return rows


def _results(rows, row, truth):
    """The detections of one image, in COCO's result format; those of score 0 only fill up."""
    image = truth["images"][rows["index"][row]]
    down, right = rows["scale"][row]
    corners = rows["boxes"][row] / np.array([right, down, right, down])
    # What was found in the padding is cut off with it.
    corners = np.clip(corners, 0, np.array([image["width"], image["height"]] * 2))
    for (x0, y0, x1, y1), score, kind in zip(corners.tolist(), rows["scores"][row].tolist(), rows["classes"][row]):
        if score > 0 and x1 > x0 and y1 > y0:
            yield {
                "image_id": image["id"],
                "category_id": truth["categories"][kind]["id"],
                "bbox": [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)],
                "score": round(score, 5),
            }
