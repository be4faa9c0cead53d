"""Write the features of images to a file: pooled or of every cell, with names and labels."""

import io
import json
import logging
import os
import pathlib
import shutil
import time

import jax
import numpy as np

import qbheat_jax
from qbheat_jax import atomic, console, data, paths
from qbheat_jax import config as config_lib
from qbheat_jax.data.sources.listed import Listed
from qbheat_jax.errors import RUN_FAILED, UserError, writing
from qbheat_jax.probe import cache, embeddings, encoders
from qbheat_jax.probe.encode import Encoding
from qbheat_jax.probe.fields import PROBE
from qbheat_jax.probe.splits import Subset
from qbheat_jax.train import lock

log = logging.getLogger("qbheat")

DTYPES = ("float32", "float16")
# Most images, and most bytes of features, of one part.
_IMAGES, _BYTES = 2048, 1 << 26


def run(
    init, to, images=(), spec="", split="", cells=False, dtype="float32", batch_size=128, image_size=0, tfds_dir="",
    max_bad_fraction=1.0, overwrite=False,
):  # fmt: skip
    """Embed image files, or a split of a data source, into a file.

    Features are written in parts to TO.parts/ as they come. The same command goes on after the last part, and removes them
    once the file is whole.

    Args:
      init: Directory of a run or ported checkpoint.
      to: Path of the file; its ending is one of `embeddings.FORMATS`.
      images: Paths of image files.
      spec: Data source, in place of images.
      split: Its split; "": the only one.
      cells: Write the features of every cell instead of their mean.
      dtype: One of DTYPES.
      batch_size: Images at once, over all devices.
      image_size: Pixels a side; 0: the model's.
      tfds_dir: As of `data.open_source`.
      max_bad_fraction: Share of the images that may be unreadable.
      overwrite: Replace the file if it exists.

    Returns:
      The summary, a dict.

    Raises:
      UserError: The input is wrong, or no image can be read.
    """
    started = time.perf_counter()
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is not accepted: it takes {' or '.join(DTYPES)}")
    if paths.remote(to):
        raise UserError(f"--to {to} is not accepted: it takes a file on this machine")
    embeddings.check(to)
    if os.path.exists(to) and not overwrite:
        raise UserError(f"--to {to} exists: pass --overwrite to replace it")
    source, split = open_images(images, spec, split, image_size or 64, tfds_dir)
    frozen, encoding = open_encoder(
        init, source, split, cells, batch_size, image_size, tfds_dir, max_bad_fraction
    )  # fmt: skip
    about = {
        **frozen.description,
        "weights": cache.weights_digest(frozen.variables),
        "image_size": frozen.image_size,
        "data": source.spec,
        "split": split,
        "identity": source.identity(split),
        "cells": cells,
        "dtype": dtype,
        "version": qbheat_jax.__version__,
    }
    place = pathlib.Path(f"{to}.parts")
    with lock.held(place):
        with writing(place, RUN_FAILED):
            parts, begin = _found(place, about)
        parts += _encode(encoding, source, split, place, begin, dtype)
        with writing(f"--to {to}", RUN_FAILED):
            summary = _join(to, place, parts, source, split, encoding.shape, {"init": str(init), **about})
    shutil.rmtree(place, ignore_errors=True)
    seconds = time.perf_counter() - started
    images = source.splits[split] - begin
    rate = images / seconds if images else None
    return {**summary, "images_per_second": rate, "seconds": seconds, "command": console.command()}


def open_images(images, spec, split, image_size, tfds_dir):
    """Return (source, name of its split) of image files or of a spec string. Raise UserError where both or none is given."""
    if bool(images) == bool(spec):
        raise UserError(f"give either IMAGE files or --data SPEC, not {'both' if images else 'neither'}")
    if images:
        if split:
            raise UserError(f"--split {split} needs --data SPEC; it does not apply to IMAGE files")
        return Listed(images), "images"
    source = data.open_source(spec, image_size=image_size, tfds_dir=tfds_dir)
    if not split and len(source.splits) > 1:
        raise UserError(f"--data {spec} has the splits {', '.join(source.splits)}: choose one by --split NAME")
    return source, source.split(split or next(iter(source.splits)))


def open_encoder(init, source, split, cells, batch_size, image_size, tfds_dir="", max_bad_fraction=1.0):
    """Return (`FrozenEncoder` of a directory, `Encoding` of its pooled features or cells)."""
    if jax.process_count() > 1:
        raise UserError(
            f"features are written by one process, on all devices of one machine; {jax.process_count()} were started"
        )
    fields = {
        "protocol": "tran-1" if cells else "lin",
        "data.source": source.spec,
        "data.tfds_dir": tfds_dir,
        "data.max_bad_fraction": max_bad_fraction,
        "image_size": image_size,
        "batch_size": batch_size,
    }
    config = config_lib.resolve(fields, PROBE)
    frozen = encoders.open_init(init, config, words=())
    if frozen.encoder.takes_clips and isinstance(source, Listed):
        raise UserError(f"--init {init} encodes clips, not image files: pass --data, such as har:PATH")
    frozen.spec.check(source, split)
    return frozen, Encoding(frozen, config, None, source.splits[split])


def _found(place, about):
    """Return (the parts of an earlier run of the same command in order, the number of images that they cover)."""
    file, parts, begin = place / "about.json", [], 0
    try:
        same = json.loads(file.read_text()) == json.loads(json.dumps(about))
    except (OSError, ValueError):
        same = False
    found = {int(path.stem.split("-")[0]): path for path in place.glob("*-*.npz")} if same else {}
    if not same:
        for path in place.glob("*-*.npz"):
            path.unlink()
        atomic.write(file, json.dumps(about, indent=2) + "\n")
    while begin in found:
        parts.append(found[begin])
        begin = int(found[begin].stem.split("-")[1])
    if begin:
        log.info("resuming after %d images, of %s", begin, place)
    return parts, begin


def _encode(encoding, source, split, place, begin, dtype):
    """Encode the images from number `begin` on. Return the paths of the parts written."""
    n, size = source.splits[split], encoding.batch_size
    if begin == n:
        return []
    most = min(_IMAGES, _BYTES // max(1, 4 * int(np.prod(encoding.shape))))
    batches, waiting, parts = max(1, most // size), [], []
    rest = Subset(source, {split: [(split, np.arange(begin, n))]}) if begin else source
    first = end = begin
    started = time.perf_counter()
    for x, labels, index in encoding.batches(rest, split):
        waiting.append((x.astype(dtype), labels, index + first))
        end = min(n, end + size)
        if len(waiting) == batches or end == n:
            features, labels, index = (np.concatenate(column) for column in zip(*waiting))
            content, path = io.BytesIO(), place / f"{begin:09d}-{end:09d}.npz"
            np.savez(content, features=features, labels=labels, index=index)
            with writing(path, RUN_FAILED):
                atomic.write(path, content.getvalue())
            parts.append(path)
            waiting, begin = [], end
            rate = (end - first) / (time.perf_counter() - started)
            log.info("%d of %d images, %.0f images/s", end, n, rate)
    return parts


def _join(to, place, parts, source, split, shape, about):
    """Write the file from its parts. Return the summary."""
    columns = {"labels": [np.zeros(0, np.int32)], "index": [np.zeros(0, np.int64)]}
    for path in parts:
        with np.load(path) as part:
            for name, column in columns.items():
                column.append(part[name])
    labels, index = (np.concatenate(columns[name]) for name in ("labels", "index"))
    if not len(index):
        shutil.rmtree(place, ignore_errors=True)
        raise UserError(f"none of the {source.splits[split]} images can be read (the log says why)")
    about = {**about, "class_names": source.classes(split), "skipped": source.splits[split] - len(index)}
    if about["skipped"]:
        log.warning("skipped %d of %d images", about["skipped"], source.splits[split])

    def features():
        for path in parts:
            with np.load(path) as part:
                yield part["features"]

    whole, names = place / f"whole{pathlib.Path(to).suffix}", [source.name(split, int(i)) for i in index]
    embeddings.write(str(whole), features(), (len(index), *shape), about["dtype"], names, labels, index, about)
    os.replace(whole, to)
    kept = {key: about[key] for key in ("init", "encoder", "step", "image_size", "data", "split", "dtype", "skipped")}
    return {"to": str(to), "n": len(index), "shape": [len(index), *shape], **kept}
