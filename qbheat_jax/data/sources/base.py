"""The interface of every source of images."""

import numpy as np

from qbheat_jax.errors import UserError

# Names that mean the validation split, wherever a split is named.
_VAL = ("val", "validation", "valid")


class Source:
    """Images by split and index.

    Attributes:
      spec: the spec string.
      splits: dict of split name -> number of examples; validation is always called `val`.
      class_names: list of str, or None if the source has no labels.
    """

    # Whether `fetch` works for any index. Otherwise the pipeline reads the source's `stream`.
    random_access = True
    # Whether the source has boxes. If so, `boxes` and `annotations` work, `class_names` are those of boxes, and whole images
    # have no label.
    boxed = False
    # Names of the classes of masks, a list of str, if the source has masks. Value k of a mask has name k.
    mask_names = None
    # Whether examples are clips. If so, `clip` works, and `fetch` returns a clip's middle RGB frame.
    clips = False
    # Sentences on the user's files that were skipped or repaired.
    notes = ()
    # Whether annotated examples are so cheap that no thread needs to prepare them ahead.
    plain = False

    def __init__(self, spec, splits, class_names):
        self.spec, self.splits, self.class_names = spec, splits, class_names

    def split(self, name):
        """Return the canonical name of a split (`validation` and `valid` mean `val`).

        Raises:
          UserError: there is no such split.
        """
        wanted = "val" if name in _VAL else name
        if wanted not in self.splits:
            known = ", ".join(f"'{split}' ({count} images)" for split, count in self.splits.items())
            raise UserError(f"data.source='{self.spec}' has no split '{name}': it has {known}")
        return wanted

    def fetch(self, split, index):
        """Return example `index` of a split: (encoded bytes or uint8 [H, W, 3], int label, str name for messages)."""
        raise NotImplementedError

    def name(self, split, index):
        """Return the name of example `index` of a split, without reading it: a file's path, else the split and the index."""
        return f"{self.spec} {self.split(split)}[{index}]"

    def paths(self, split):
        """Return the paths of a split's examples (list of str) where each is a file on this machine, otherwise None."""
        return None

    def boxes(self, split, index):
        """Return the `annotations.Boxes` of example `index` of a split.

        Raises:
          UserError: the source has no boxes.
        """
        raise self._no_boxes()

    def masks(self, split, index):
        """Return uint8 [H, W] of example `index` of a split: numbers in `mask_names`, 255 for pixels that do not count.

        Raises:
          UserError: the source has no masks.
        """
        raise UserError(f"data.source='{self.spec}' has no masks: masks:PATH and scenes have them")

    def clip(self, split, index):
        """Return the `Clip` of example `index` of a split. Reads no file.

        Raises:
          UserError: the source has no clips.
        """
        raise UserError(f"data.source='{self.spec}' has no clips: har:PATH and shapes have them")

    def annotations(self, split):
        """Return a split as a dict in COCO's format, the ground truth of detection; image i of it is example i."""
        raise self._no_boxes()

    def _no_boxes(self):
        return UserError(
            f"data.source='{self.spec}' has no boxes: detection takes coco:IMAGES_DIR,ANNOTATIONS.json, scenes, or a tfds:NAME "
            "with boxes"
        )

    def labels(self, split):
        """Return int32 [n], -1 for unlabelled examples; None if the labels are unknown before the images are read."""
        return as_labels(np.full(self.splits[self.split(split)], -1)) if self.boxed else None

    def classes(self, split):
        """Return the class names of a split (list of str), or None if it has no labels."""
        self.split(split)
        return None if self.boxed else self.class_names

    def identity(self, split):
        """Return the cache key of a split: text that identifies its images."""
        split = self.split(split)
        return f"{self.spec} {split} {self.splits[split]}"

    def check_labels(self, split_a, split_b):
        """Check that both splits have labels, with the same classes.

        Raises:
          UserError: a split has no labels, or the classes differ; the message names some.
        """
        for name in (split_a, split_b):
            if self.classes(name) is None:
                raise UserError(f"split '{name}' of data.source='{self.spec}' has no labels{self._labels_hint(name)}")
        a, b = self.classes(split_a), self.classes(split_b)
        only_a, only_b = _first(set(a) - set(b)), _first(set(b) - set(a))
        if only_a or only_b:
            parts = [
                f"only in '{split}': {classes}" for split, classes in ((split_a, only_a), (split_b, only_b)) if classes
            ]
            raise UserError(
                f"data.source='{self.spec}' has different classes in '{split_a}' ({len(a)}) and '{split_b}' "
                f"({len(b)}): {'; '.join(parts)}. Both splits need the same class names"
            )

    def check_labelled(self, split, labels=None):
        """Check that no label of a split is -1.

        Args:
          split: name of the split.
          labels: int [n]; None for those that the source knows before any image is read.

        Raises:
          UserError: some labels are -1; the message gives their number and class.
        """
        labels = self.labels(split) if labels is None else labels
        if labels is None:
            return
        count = int((np.asarray(labels) < 0).sum())
        if not count:
            return
        names = set(self.classes(split) or ()) - set(self.class_names or ())
        what = f" have the class {sorted(names)[0]!r}, which no training split has" if names else " have no label"
        others = f" ({len(names)} such classes: {_first(names)})" if len(names) > 1 else ""
        raise UserError(f"data.source='{self.spec}' split '{split}': {count} images{what}{others}")

    def _labels_hint(self, split):
        return ""


class ArraySource(Source):
    """A source whose splits are whole arrays in memory; a subclass implements `images` and `labels`."""

    def images(self, split):
        """Return uint8 [n, H, W, 3]."""
        raise NotImplementedError

    def fetch(self, split, index):
        split = self.split(split)
        return self.images(split)[index], int(self.labels(split)[index]), f"{self.spec} {split}[{index}]"


def _first(names, count=5):
    names = sorted(names)
    return ", ".join(names[:count]) + (f", ... ({len(names)} in all)" if len(names) > count else "")


def as_labels(values):
    """Return values as a read-only int32 [n], because all callers share the array."""
    labels = np.asarray(values, np.int32)
    labels.flags.writeable = False
    return labels
