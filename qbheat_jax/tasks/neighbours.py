"""Find the nearest images to queries by the cosine similarity of pooled features, and write a page of them."""

import logging
import os
import pathlib
import time

import numpy as np

from qbheat_jax import console, data, paths
from qbheat_jax.data import decode
from qbheat_jax.data.sources.listed import Listed
from qbheat_jax.data.specs import image
from qbheat_jax.errors import UserError
from qbheat_jax.probe import cache, embeddings, knn
from qbheat_jax.probe.features import Features
from qbheat_jax.report import neighbours_page
from qbheat_jax.tasks import embed

log = logging.getLogger("qbheat")


def run(init, queries, among, to="neighbours.html", top=8, split="", batch_size=128, image_size=0, tfds_dir=""):
    """Find the nearest images to query files, and write a page.

    Args:
      init: Directory of a run or ported checkpoint.
      queries: Paths of image files. Those that cannot be read are logged and left out.
      among: Path of a file of `embed`, by the same weights; or a data source.
      to: Path of the page.
      top: Neighbours of each query. A query's own file is none of them.
      split, tfds_dir: Of the data source, see `embed.run`.
      batch_size, image_size: As of `embed.run`.

    Returns:
      {"page", "init", "among", "n": images compared with, "queries": [{"query", "neighbours": [{"name", "similarity",
      "class"}]}], "seconds", "command"}.

    Raises:
      UserError: The input is wrong, or no query can be read.
    """
    started = time.perf_counter()
    if top < 1:
        raise UserError(f"--top {top} is not accepted: it takes a number above 0")
    asked, file = Listed(queries), os.path.splitext(among)[1] in embeddings.FORMATS
    batch_size = min(batch_size, max(8, len(queries))) if file else batch_size
    frozen, encoding = embed.open_encoder(init, asked, "images", False, batch_size, image_size)
    if file:
        found = _read(among, frozen)
        source = _source_of(found, tfds_dir)
    else:
        source, split = embed.open_images((), among, split, frozen.image_size, tfds_dir)
        frozen.spec.check(source, split)
        found = _encoded(encoding, source, split)
    vectors, _, rows = _all(encoding, asked, "images")
    if not len(rows):
        raise UserError(f"none of the {len(queries)} queries can be read as an image (the log says why)")

    count = min(len(found.names), top + 1)  # one more, since a query may be among them
    bank = Features.of(found.features.astype(np.float32), np.arange(len(found.names)))
    distance, near = knn.find(bank, Features.of(vectors, np.zeros(len(rows))), count, batch_size)
    entries, shown = [], []
    for row, distances, places in zip(rows, distance, near):
        query = str(queries[row])
        others = [(d, int(k)) for d, k in zip(distances, places) if not _same(query, found.names[k])][:top]
        entries.append({"query": query, "neighbours": [_entry(found, d, k) for d, k in others]})
        shown.append((_pixels(asked, "images", row), [_shown(source, found, k) for _, k in others]))
    about = {"init": str(init), "among": str(among), "n": len(found.names), "queries": entries}
    page = neighbours_page.write({**about, **frozen.description}, shown, pathlib.Path(to))
    return {"page": str(page), **about, "seconds": time.perf_counter() - started, "command": console.command()}


def _read(among, frozen):
    """Return the pooled `Embeddings` of a file. Raise UserError where another encoder made them."""
    found = embeddings.read(paths.expand(among, "--among"))
    own = {"weights": cache.weights_digest(frozen.variables), "image_size": frozen.image_size}
    for key, value in own.items():
        if found.about.get(key) != value:
            raise UserError(
                f"--among {among} is not accepted: its features are of another {key.replace('_', ' ')} than those of "
                f"--init; embed its images again"
            )
    if found.features.ndim > 2:
        pooled = found.features.reshape(len(found.names), -1, found.features.shape[-1]).mean(1, dtype=np.float32)
        found = embeddings.Embeddings(pooled, found.names, found.labels, found.index, found.about)
    return found


def _source_of(found, tfds_dir):
    """Return the source of the images in a file, or None where it cannot be opened."""
    if found.about["data"] == "images":
        return Listed(found.names)
    try:
        return data.open_source(found.about["data"], image_size=found.about["image_size"], tfds_dir=tfds_dir)
    except UserError as error:
        log.warning("the page has no pictures of the neighbours: %s", error)
        return None


def _encoded(encoding, source, split):
    """Return the `Embeddings` of a split of a source, in memory."""
    features, labels, index = _all(encoding, source, split)
    if not len(index):
        raise UserError(f"none of the {source.splits[split]} images of --among can be read (the log says why)")
    names = [source.name(split, int(i)) for i in index]
    about = {"data": source.spec, "split": split, "class_names": source.classes(split)}
    return embeddings.Embeddings(features, names, labels, index, about)


def _all(encoding, source, split):
    """Return (features [N, C], labels int32 [N], index int64 [N]) of the readable images of a split."""
    return tuple(np.concatenate(column) for column in zip(*encoding.batches(source, split)))


def _same(query, name):
    """Return whether a query is the file of that name."""
    try:
        return os.path.samefile(query, name)
    except (OSError, ValueError):
        return False


def _entry(found, distance, k):
    label, names = found.labels[k], found.about.get("class_names")
    return {
        "name": found.names[k],
        "similarity": float(1 - distance),
        "class": names[label] if names and 0 <= label < len(names) else None,
    }


def _shown(source, found, k):
    """Return an image of the file or source as pixels, None where it is gone or cannot be fetched by its number."""
    if source is None or not source.random_access:
        return None
    if isinstance(source, Listed):
        return _pixels(source, "images", k)
    return _pixels(source, found.about["split"], int(found.index[k]))


def _pixels(source, split, index):
    try:
        return image.pixels(source.fetch(split, index)[0])
    except (OSError, decode.BadImage, UserError) as error:
        log.warning("%s cannot be shown: %s", source.name(split, index), error)
        return None
