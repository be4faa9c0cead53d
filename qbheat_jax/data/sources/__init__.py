"""The one door to images: a spec string -> a Source."""

import logging

from qbheat_jax import paths
from qbheat_jax.data.sources.synthetic import Synthetic
from qbheat_jax.errors import UserError

_log = logging.getLogger("qbheat")
# Notes that the log has already: a source may be opened several times in a process.
_told = set()

ACCEPTED = (
    "'photos', 'tfds:NAME[/CONFIG]', 'folder:PATH', 'coco:IMAGES_DIR,ANNOTATIONS.json', 'scenes' or 'scenes:N', 'synthetic' "
    "or 'synthetic:N'"
)


def open_source(spec, *, image_size=64, tfds_dir=""):
    """Spec string -> `base.Source`. What of the user's files was passed over is in its `notes`, and in the log.

    `image_size` (pixels) is the size at which `synthetic` makes its images; `tfds_dir` is the folder that holds
    the prepared data sets of `tfds:` ("" for its default). Raises UserError where the spec is not understood or
    what it names is not there.
    """
    source = _opened(str(spec), image_size, paths.expand(tfds_dir, "data.tfds_dir") if tfds_dir else "")
    for note in source.notes:
        if note not in _told:
            _told.add(note)
            _log.warning("%s", note)
    return source


def _opened(spec, image_size, tfds_dir):
    kind = spec.partition(":")[0]
    # Each kind brings its own dependencies: imported when it is asked for.
    if kind == "synthetic":
        return Synthetic(spec, image_size)
    if spec == "photos":
        from qbheat_jax.data.sources.photos import Photos

        return Photos(spec)
    if kind == "scenes":
        from qbheat_jax.data.sources.scenes import Scenes

        return Scenes(spec)
    if kind == "coco":
        from qbheat_jax.data.sources.coco import Coco

        return Coco(spec)
    if kind == "folder":
        from qbheat_jax.data.sources.folder import Folder

        return Folder(spec)
    if kind == "tfds":
        try:
            from qbheat_jax.data.sources.tfds_boxes import open_tfds
        except ImportError as error:
            raise UserError(
                f"data.source='{spec}' is read by tensorflow, which is missing ({error}), with data.device_cache too: pip "
                "install tensorflow-cpu tensorflow-datasets, or use data.source='folder:PATH'"
            ) from error
        return open_tfds(spec, tfds_dir)
    raise UserError(f"data.source='{spec}' is not understood: write {ACCEPTED}")


def describe(source):
    """One line for the log: images by split, and classes.

    >>> describe(open_source("synthetic:80"))
    'synthetic:80: train 80, val 10, test 10 images; 10 classes'
    """
    splits = ", ".join(f"{split} {count:,}" for split, count in source.splits.items())
    kinds = "classes of boxes" if source.boxed else "classes"
    classes = f"{len(source.class_names)} {kinds}" if source.class_names else "no labels"
    return f"{source.spec}: {splits} images; {classes}"
