"""Analyse an encoder: test the hypothesis of A and B on images, describe the operators, and draw both."""

import logging
import time

import jax
import numpy as np
from etils import epath

from qbheat_jax import console, data
from qbheat_jax.analysis import (
    decoder_images,
    extrapolation_test,
    hypothesis,
    maps,
    operators,
    outputs,
    pictures,
    target,
)
from qbheat_jax.errors import UserError
from qbheat_jax.report import sample
from qbheat_jax.train import lock
from qbheat_jax.train.checkpoint import Checkpoints

__all__ = ["run", "text"]

log = logging.getLogger("qbheat")

# Wider features are reduced to this many principal components.
WIDEST = 128
# Images shown as feature maps, and as reconstructions.
_SHOWN, _DECODED = 6, 4

text = outputs.text


def run(config, workdir, init):
    """Analyse an encoder. Write analysis.json, analysis.csv, pictures.npz and PNGs.

    Args:
      config: resolved by `fields.ANALYSE`.
      workdir: where the files go; WORKDIR/analysis where WORKDIR is the run itself.
      init: the directory of a run or ported checkpoint, or "random".

    Returns:
      (folder of the files, content of analysis.json).

    Raises:
      UserError: the encoder or the images cannot be analysed.
    """
    started, workdir = time.perf_counter(), epath.Path(workdir)
    if jax.process_count() > 1:
        raise UserError(f"an analysis runs in one process; {jax.process_count()} were started")
    given = target.open_target(init, config)
    frozen = given.frozen
    source = data.open_source(frozen.source, image_size=frozen.image_size, tfds_dir=config.data.tfds_dir)
    chosen = target.roles(source, config.images, config.seed)
    folder = outputs.folder(workdir, init)
    outputs.make(folder)
    with lock.held(folder):
        return folder, _analysed(config, init, given, source, chosen, folder, started)


def _analysed(config, init, given, source, chosen, folder, started):
    """Analyse, write all files to the folder, and return the result."""
    frozen = given.frozen
    read = {role: target.read(source, split, rows, config, frozen.image_size) for role, (split, rows) in chosen.items()}
    images = {role: pair[0] for role, pair in read.items()}
    log.info("%s", ", ".join(f"{len(x)} images of {chosen[role][0]} for {role}" for role, x in images.items()))

    log.info("encoding, and fitting maps")
    field = _Field(given, images)
    rows, one_cell = _tests(field, config.seed, "trained" if init != "random" else "random")
    dimensions = {"trained" if init != "random" else "random": field.dimension}
    if init != "random":
        log.info("the same with the encoder untrained")
        control = _Field(given.untrained(config.seed), images)
        rows += _tests(control, config.seed, "random")[0]
        dimensions["random"] = control.dimension
    log.info("pictures")
    order = sample.contrast_first(
        {"image": images["test"], "label": read["test"][1]}, sample.distinct_first(read["test"][1])
    )
    arrays, sheets = _features(field, images["test"], order[:_SHOWN])
    continues = given.heat is not None and bool(field.placements)
    if continues:
        _decoded(given.frozen.model, images["test"], order, arrays, sheets)

    height, width, channels = field.whole["test"].shape[1:]
    result = {
        "init": str(init),
        "data": source.spec,
        **frozen.description,
        "image_size": frozen.image_size,
        "cells": [height, width],
        "channels": channels,
        "components": None if field.basis is None else field.basis.shape[1],
        "variance_kept": field.kept,
        "images": {role: {"split": chosen[role][0], "count": len(x)} for role, x in images.items()},
        "seed": config.seed,
        "effective_dimension": dimensions,
        "rows": rows,
        "operators": _operators(given, one_cell, height, width),
        "drift": _drift(init, given),
        "placements": [int(q) for q in field.placements],
        "reconstructed": [int(q) for q in arrays.get("reconstructed_at", ())],
        "no_quarters": field.no_quarters,
        "statistics": decoder_images.statistics(frozen.model.objective.target) if continues else None,
        "animated": given.heat[1].propagator if continues else None,
        "seconds": time.perf_counter() - started,
        "command": console.command(),
    }
    outputs.write(folder, result, arrays, sheets)
    return result


class _Field:
    """The maps of one encoder: of whole images by role, and extrapolated from their quarters."""

    def __init__(self, given, images):
        self.subject = given
        self.whole = {role: given.maps(x) for role, x in images.items()}
        height, width, channels = self.whole["train"].shape[1:]
        if min(height, width) < 3:
            raise UserError(
                f"a map of {height} x {width} cells has no derivatives: larger images are needed, --config.image_size "
                f"{4 * given.frozen.encoder.stride} or more"
            )
        self.basis, self.kept = None, 1.0
        if channels > WIDEST:
            self.basis, self.kept = maps.principal(self.whole["train"], WIDEST)[1:]
        self.dimension = maps.effective_dimension(self.whole["train"])
        self.placements, self.no_quarters = target.placements(given, height, width)
        self.continuation = None
        if self.placements:
            crops = {q: {role: given.quarter_maps(x, q) for role, x in images.items()} for q in self.placements}
            learnt = given.continued if given.heat is not None else None
            self.continuation = extrapolation_test.ExtrapolationTest(self.whole, crops, self.basis, learnt)

    def learnt(self, direction, k):
        """Return the learnt operator's predictions, as `hypothesis.steps` takes them."""
        made = {role: self.subject.carried(self.whole[role], direction, k) for role in ("train", "test")}
        return maps.departures(made, self.basis)["test"]


def _tests(field, seed, encoder):
    """Return (rows of figures of one encoder, its maps fitted over one cell)."""
    fields = maps.departures(field.whole, field.basis)
    learnt = (
        field.learnt if field.placements and field.subject.heat is not None and field.subject.heat[1].names else None
    )
    stepped, one_cell = hypothesis.steps(fields, seed, learnt)
    rows = [_labelled(row, encoder, "true") for row in [*hypothesis.derivatives(fields, seed), *stepped]]
    mixed = {role: maps.shuffled(z, (seed, i)) for i, (role, z) in enumerate(field.whole.items())}
    fields = maps.departures(mixed, field.basis)
    stepped = hypothesis.steps(fields, seed)[0]
    rows += [_labelled(row, encoder, "shuffled") for row in [*hypothesis.derivatives(fields, seed), *stepped]]
    if field.continuation is not None:
        rows += [_labelled(row, encoder, "true") for row in field.continuation.rows(seed)]
    return rows, one_cell


def _labelled(row, encoder, positions):
    return {"encoder": encoder, "positions": positions, **row}


def _operators(given, one_cell, height, width):
    cells = {"x": width / 2, "y": height / 2}
    described = {"fitted": operators.describe(operators.fitted(one_cell, cells), operators.FITTED, cells)}
    if given.operator is not None:
        described["learnt"] = operators.describe(*given.operator, cells)
    return described


def _drift(init, given):
    """Return rows on the operators of the checkpoints that the run kept."""
    if given.operator is None:
        return []
    saved = Checkpoints(init, keep=None)
    kept = []
    for step in saved.steps():
        try:
            params = saved.restore_variables(step)[1]["params"]
            kept.append((step, given.frozen.model.objective.operator(params)[0]))
        except UserError as error:
            log.warning("%s", error)
    saved.close()
    return operators.drift(kept, given.operator[1])


def _features(field, images, chosen):
    """Return ({name: arrays for the page}, {"features": PNG}) of the chosen test images."""
    colours = pictures.Colours.of(field.whole["train"])
    arrays = {"images": images[chosen], "map": colours(field.whole["test"][chosen])}
    departures = maps.departures(field.whole, field.basis)["test"][chosen]
    alike = [pictures.likeness(z) for z in departures]
    arrays["like"] = np.stack([pictures.likeness_colours(*one) for one in alike])
    columns = ["images", "map", "like"]
    if field.continuation is not None:
        columns += _continued(field, chosen, colours, arrays)
    sheet = pictures.sheet([[arrays[name][i] for name in columns] for i in range(len(chosen))])
    return arrays, {"features": sheet}


def _continued(field, chosen, colours, arrays):
    """Add each predictor's extrapolation and its error to `arrays`; placements take turns. Return the names added."""
    made, placed = field.continuation, [field.placements[i % len(field.placements)] for i in range(len(chosen))]
    arrays["placed"] = np.array(placed)
    mean = field.whole["train"].mean(0)
    back = (lambda z: z) if field.basis is None else (lambda z: z @ field.basis.T)
    names = []
    for predictor in made.predictors:
        grids = np.stack([made.grid(predictor, q)[i] for i, q in zip(chosen, placed)])
        errors = np.stack(
            [pictures.error(made.grid(predictor, q), made.target["test"])[i] for i, q in zip(chosen, placed)]
        )
        arrays[predictor], arrays[f"{predictor}_error"] = colours(back(grids) + mean), pictures.error_colours(errors)
        names += [predictor, f"{predictor}_error"]
    return names


def _decoded(model, images, order, arrays, sheets):
    """Add reconstructions: arrays for the page, sheets as PNGs, the animation."""
    few = images[order[:_DECODED]]
    placed = decoder_images.placements(model, few)
    arrays["originals"], arrays["reconstructed"] = few, np.stack([placed[q] for q in placed], 1)
    arrays["reconstructed_at"] = np.array(list(placed))
    columns = [[few[i], *arrays["reconstructed"][i]] for i in range(len(few))]
    sheets["placements"] = pictures.sheet(columns)
    arrays["beyond"] = decoder_images.beyond(model, few)
    sheets["beyond"] = pictures.sheet([list(arrays["beyond"])], tile=2 * 96)
    if not model.objective.decoder.heat.shortens:
        return
    allowed = model.objective.decoder.placements
    turns = np.array([allowed[i % len(allowed)] for i in range(len(few))], np.int32)
    shown = decoder_images.spreading(model, few, turns)
    sheets["spread"], sheets["spread_end"] = decoder_images.animated(shown, scale=max(1, 160 // few.shape[1]))
