"""Open a source of images or clips from its spec string."""

import logging

from qbheat_jax import paths
from qbheat_jax.data.sources.synthetic import Synthetic
from qbheat_jax.errors import UserError

_log = logging.getLogger("qbheat")
# Notes that are already in the log; a process may open a source several times.
_told: set[str] = set()

ACCEPTED = (
    "'photos', 'tfds:NAME[/CONFIG]', 'folder:PATH', 'coco:IMAGES_DIR,ANNOTATIONS.json', 'masks:PATH', 'scenes' or 'scenes:N', "
    "'har:PATH[,STRIDE[,OFFSET]]', 'shapes' or 'shapes:N', 'synthetic' or 'synthetic:N'"
)


def open_source(spec, *, image_size=64, tfds_dir=""):
    """Open the source of a spec string, and log its `notes` on skipped or repaired files.

    Args:
      spec: str, one of ACCEPTED.
      image_size: pixels a side of the images that `synthetic` makes.
      tfds_dir: folder of the prepared data sets of `tfds:`; "" for the default.

    Returns:
      `base.Source`.

    Raises:
      UserError: the spec is not understood, or its files or packages are missing.
    """
    source = _opened(str(spec), image_size, paths.expand(tfds_dir, "data.tfds_dir") if tfds_dir else "")
    for note in source.notes:
        if note not in _told:
            _told.add(note)
            _log.warning("%s", note)
    return source


def _opened(spec, image_size, tfds_dir):
    kind = spec.partition(":")[0]
    # Import each kind on demand, because it brings its own dependencies.
    if kind == "synthetic":
        return Synthetic(spec, image_size)
    if spec == "photos":
        from qbheat_jax.data.sources.photos import Photos

        return Photos(spec)
    if kind == "scenes":
        from qbheat_jax.data.sources.scenes import Scenes

        return Scenes(spec)
    if kind == "shapes":
        from qbheat_jax.data.sources.shapes import Shapes

        return Shapes(spec)
    if kind == "har":
        from qbheat_jax.data.sources.har import Har

        return Har(spec)
    if kind == "coco":
        from qbheat_jax.data.sources.coco import Coco

        return Coco(spec)
    if kind == "masks":
        from qbheat_jax.data.sources.masks import Masks

        return Masks(spec)
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
    raise UserError(f"data.source='{spec}' is not accepted: it takes {ACCEPTED}")


def describe(source):
    """Return one line for the log: the number of images or clips of each split, and of classes.

    >>> describe(open_source("synthetic:80"))
    'synthetic:80: train 80, val 10, test 10 images; 10 classes'
    """
    splits = ", ".join(f"{split} {count:,}" for split, count in source.splits.items())
    kinds = "classes of boxes" if source.boxed else "classes"
    classes = f"{len(source.class_names)} {kinds}" if source.class_names else "no labels"
    if source.mask_names:
        classes = f"{len(source.mask_names)} classes of pixels" + (f", {classes}" if source.class_names else "")
    return f"{source.spec}: {splits} {'clips' if source.clips else 'images'}; {classes}"
