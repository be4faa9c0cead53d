"""Report this machine's devices and packages, or the contents of a data source."""

import concurrent.futures
import importlib.metadata
import platform

import jax
import numpy as np

from qbheat_jax import __version__, data, paths
from qbheat_jax.data import augment, decode, shrink

# Number of images or clips decoded per split, evenly spread, and frames of each clip and modality.
_SAMPLE, _FRAMES = 200, 8

# {package: its use here}. Those after the first row are optional extras.
PACKAGES = {
    "jax": "arrays and compilation", "flax": "modules", "optax": "optimizers", "orbax-checkpoint": "checkpoints",
    "tensorflow": "tfds: sources, the others without data.device_cache, TensorBoard",
    "tensorflow-cpu": "the same, without GPU code",
    "tensorflow-datasets": "tfds: sources", "clu": "TensorBoard", "scikit-image": "the photos source",
    "scikit-learn": "the photos source, report", "libtpu": "TPUs; preflight of TPUs",
    "jax-cuda13-pjrt": "NVIDIA GPUs; preflight of GPUs", "matplotlib": "report", "jinja2": "report",
    "pyarrow": "embed: .parquet",
}  # fmt: skip


def describe():
    """Return a report on versions, devices and packages, about twenty lines."""
    lines = [f"qbheat_jax {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    for device in jax.devices():
        lines.append(f"device {device.id}: {device.platform}, {device.device_kind}")
    for package, use in PACKAGES.items():
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        lines.append(f"{package:20} {version:15} {use}")
    return "\n".join(lines)


def describe_data(spec, tfds_dir=""):
    """Return a report on a data source: splits, classes, skipped files, and unreadable images in a sample.

    Args:
      spec: A data source, such as "folder:PATH".
      tfds_dir: Data directory of tensorflow-datasets; "" for its default.

    Returns:
      The text of the report.

    Raises:
      UserError: The source cannot be opened.
    """
    source = data.open_source(spec, tfds_dir=tfds_dir)
    what = "clips" if source.clips else "images"
    lines = [data.describe(source), *source.notes]
    for split, count in source.splits.items():
        labels = None if source.boxed else source.labels(split)
        if labels is not None and source.classes(split):
            names, counts = source.class_names, np.bincount(labels[labels >= 0], minlength=len(source.class_names))
            few, many = int(counts.argmin()), int(counts.argmax())
            lines.append(
                f"{split}: from {counts[few]:,} {what} of {names[few]!r} to {counts[many]:,} of {names[many]!r}"
            )
        rows = np.unique(np.linspace(0, count - 1, min(count, _SAMPLE)).astype(int)).tolist()
        read = _bad_clips if source.clips else _bad_masks if source.mask_names else _bad_images
        bad, masks = read(source, split, rows), " with their masks" if source.mask_names else ""
        lines.append(f"{split}: {len(rows) - len(bad)} of {len(rows)} {what}{masks} in a sample can be decoded")
        lines += [f"    {paths.printable(name)}: {paths.printable(reason)}" for name, reason in bad[:5]]
    return "\n".join(lines)


def _bad_images(source, split, rows):
    """Return [(name, reason), ...] of the examples that cannot be decoded."""
    return [(one.name, one.reason) for one in shrink.read(source, split, rows, 64, 0) if one.image is None]


def _bad_masks(source, split, rows):
    """As `_bad_images`, of images and masks."""
    spec, found = data.MasksSpec(64), []
    for row in rows:
        name = f"{split}[{row}]"
        try:
            content, mask, name = spec.fetch(source, split, row)
            spec.prepare(spec.empty(1), 0, content, mask, 0, row)()
        except (OSError, decode.BadImage) as error:
            reason = getattr(error, "strerror", None) or str(error)
            found.append((getattr(error, "filename", None) or name, reason))
    return found


def _bad_clips(source, split, rows):
    def reason(clip):
        try:
            clip.decode(augment.one_of_each_segment(clip.count, np.full(_FRAMES, 0.5)).tolist())
        except decode.BadImage as error:
            return str(error)

    clips = [source.clip(split, row) for row in rows]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return [(clip.name, why) for clip, why in zip(clips, pool.map(reason, clips)) if why]
