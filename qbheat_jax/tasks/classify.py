"""Classify single images, or measure top-1 and top-5 over a labelled data set."""

import json
import logging
import time

import jax
import numpy as np
from etils import epath

from qbheat_jax import atomic, console, data, device_mesh, pretrained
from qbheat_jax.data import decode, labels
from qbheat_jax.data.sources import files
from qbheat_jax.errors import UserError, writing
from qbheat_jax.eval.accuracy import Accuracy
from qbheat_jax.eval.evaluate import Evaluator
from qbheat_jax.probe import encoders
from qbheat_jax.probe.features import slices

log = logging.getLogger("qbheat")

# Batch size of `images`: small, so that one image is not padded to many.
_BATCH = 8


def images(directory, paths, top=5, image_size=0):
    """Return the likeliest classes of image files. Unreadable files are logged, counted and left out.

    Args:
      directory: A workdir with a classifier.
      paths: Files of any format that Pillow reads.
      top: How many classes.
      image_size: Pixels a side, 0 for the model's own.

    Returns:
      [{"path": str, "top": [(class name, probability), ...]}, ...].

    Raises:
      UserError: No file can be read, or the model has no classifier.
    """
    if not paths or top < 1:
        raise UserError(f"{len(paths)} images and top={top} are not accepted: at least one of each is needed")
    model = _open(directory, image_size)
    if model.encoder.takes_clips:
        raise UserError(f"--init {directory} classifies clips, not image files: pass --data, such as har:PATH")
    names = model.class_names or [f"class {k}" for k in range(model.config.head.classes)]
    spec = data.ImageSpec(model.config.image_size, 0, (0,), False)  # the central crop, as in evaluation
    bad, results = data.BadFiles(1.0, len(paths)), []
    for begin in range(0, len(paths), _BATCH):
        read, pixels = [], []
        for path in paths[begin : begin + _BATCH]:
            try:
                pixels.append(spec.image(files.read(path), 0, 0))
                read.append(str(path))
            except (decode.BadImage, OSError) as error:
                bad.add(path, getattr(error, "strerror", None) or error)
        if read:
            probabilities = _probabilities(model, np.stack(pixels), min(_BATCH, len(paths)))
            for path, row in zip(read, probabilities):
                likeliest = np.argsort(-row, kind="stable")[:top]
                results.append({"path": path, "top": [(names[k], float(row[k])) for k in likeliest]})
    if not results:
        raise UserError(f"none of the {len(paths)} files can be read as an image (the log says why), first {paths[0]}")
    if bad.count:
        log.warning("skipped %d of %d files", bad.count, len(paths))
    return results


def text(results):
    """Return the results of `images` as a block of lines an image."""
    blocks = []
    for result in results:
        lines = [result["path"], *(f"  {probability:6.1%}  {name}" for name, probability in result["top"])]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def dataset(
    directory, spec, split=None, batch_size=128, workdir=None, image_size=0, tfds_dir="", max_bad_fraction=0.01
):
    """Measure top-1 and top-5 of a classifier over a labelled split, in one process.

    The data's classes are matched by name (`labels.match`) with the model's outputs, all of which compete.

    Args:
      directory: A workdir with a classifier.
      spec: A data source.
      split: Its split; by default test, else val, else the only one.
      batch_size: Images at once, over all devices.
      workdir: Where result.json goes, None for nowhere.
      image_size: Pixels a side, 0 for the model's own.
      tfds_dir: Where `tfds:` keeps its data.
      max_bad_fraction: The share of images that may be unreadable.

    Returns:
      The result, a dict.

    Raises:
      UserError: Model and classes do not fit, before anything is compiled.
    """
    started = time.perf_counter()
    if jax.process_count() > 1:
        raise UserError(
            f"classify runs in one process, on all devices of one machine; {jax.process_count()} were started"
        )
    model = _open(directory, image_size)
    size, classes = model.config.image_size, model.config.head.classes
    source = data.open_source(spec, image_size=size, tfds_dir=tfds_dir)
    split = _split(source) if split is None else source.split(split)
    outputs, shown = _outputs(source, split, model), encoders.evaluation_spec(model.config, size)
    shown.check(source, split)
    if workdir is not None:
        _make(workdir)

    evaluator = Evaluator(
        Accuracy(model.objective, source, split, classes, outputs), source, split, device_mesh.make_mesh({"data": -1}),
        shown, batch_size=batch_size, max_bad_fraction=max_bad_fraction,
    )  # fmt: skip
    evaluator(model.variables)
    measured = evaluator.measured

    result = {
        "protocol": "classify",
        "init": str(directory),
        "data": source.spec,
        "split": split,
        **measured.figures,
        "n": measured.n,
        "skipped": measured.skipped,
        "classes": classes,
        "data_classes": len(source.class_names),
        "encoder": model.config.encoder.name,
        "step": model.step,
        "image_size": size,
        "images_per_second": measured.images_per_second,
        "seconds": time.perf_counter() - started,
        "command": console.command(),
    }
    if workdir is not None:
        _write(workdir, result)
    return result


def line(result):
    """Return the result of `dataset` in one line."""
    return (
        f"{result['encoder']} of {result['init']}: top-1 {result['top1']:.3f}, top-5 {result['top5']:.3f} on "
        f"{result['n']} images of {result['data']} {result['split']} ({result['seconds']:.0f} s)"
    )


def _open(directory, image_size):
    """Return the model of a workdir for images of `image_size` pixels, 0 for its own.

    Raises:
      UserError: It has no classifier, or the names of its classes do not fit it.
    """
    if image_size < 0:
        raise UserError(f"image_size={image_size} is not accepted: it takes a number of pixels, or 0 for the model's")
    model = pretrained.open_model(directory)
    if getattr(model.objective, "head", None) is None:
        raise UserError(
            f"--init {directory} has no classifier: port a checkpoint with its head (qbheat port --head keep), or train "
            "one on its features with qbheat probe"
        )
    known = model.class_names
    if known is not None and len(known) != model.config.head.classes:
        raise UserError(
            f"{directory}/{labels.FILE} names {len(known)} classes, and the classifier has {model.config.head.classes}: "
            "it takes one line an output; correct the file, or remove it"
        )
    return model if image_size in (0, model.config.image_size) else model.sized(image_size)


def _probabilities(model, images, batch):
    """Return probabilities float32 [n, classes] of images uint8 [n, S, S, 3]. Batches of one shape share a program."""
    logits = [np.asarray(model.logits(part))[mask] for part, mask in slices(images, batch)]
    return np.asarray(jax.nn.softmax(np.concatenate(logits), axis=-1))


def _split(source):
    for name in ("test", "val"):
        if name in source.splits:
            return name
    if len(source.splits) > 1:
        raise UserError(
            f"data.source={source.spec!r} has the splits {', '.join(source.splits)}: choose one by --split NAME"
        )
    return next(iter(source.splits))


def _outputs(source, split, model):
    """Return the model's output for each class of the data, int32 [classes]."""
    if source.classes(split) is None:
        raise UserError(
            f"data.source={source.spec!r} split {split!r} has no labels, which come from the names of folders, as in "
            "PATH/val/CLASS/IMAGE; for images without labels give the files themselves"
        )
    numbers = [str(k) for k in range(model.config.head.classes)]
    keys, names = zip(*model.classes) if model.classes else (numbers, numbers)
    outputs = labels.match(source.class_names, keys, names)
    source.check_labelled(split)
    return outputs


def _make(workdir):
    with writing(f"--workdir {workdir}"):
        epath.Path(workdir).mkdir(parents=True, exist_ok=True)


def _write(workdir, result):
    path = epath.Path(workdir) / "result.json"
    with writing(path):
        atomic.write(path, json.dumps(result, indent=2) + "\n")
