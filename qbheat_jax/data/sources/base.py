"""What every source of images offers."""

import numpy as np

from qbheat_jax.errors import UserError

# Names that mean the validation split, wherever a split is named.
_VAL = ("val", "validation", "valid")


class Source:
    """Images by split and index.

    `spec`: the spec string; `splits`: dict of split name -> number of examples (validation is always `val`);
    `class_names`: list of str, or None where the source has no labels.
    """

    # Whether `fetch` works for any index; otherwise the pipeline reads the source's `stream`.
    random_access = True
    # Whether it has boxes; then `boxes` and `annotations` are there, `class_names` are those of boxes, and no image as a
    # whole has a label.
    boxed = False
    # Sentences on what of the user's files was passed over or repaired.
    notes = ()
    # Whether boxed examples are so cheap that no thread need make them ahead.
    plain = False

    def __init__(self, spec, splits, class_names):
        self.spec, self.splits, self.class_names = spec, splits, class_names

    def split(self, name):
        """The split's own name (`validation` and `valid` mean `val`). Raises UserError where there is none."""
        wanted = "val" if name in _VAL else name
        if wanted not in self.splits:
            known = ", ".join(f"'{split}' ({count} images)" for split, count in self.splits.items())
            raise UserError(f"data.source='{self.spec}' has no split '{name}': it has {known}")
        return wanted

    def fetch(self, split, index):
        """Example `index` (int) of a split: (encoded bytes or uint8[H, W, 3], label int, name str for messages)."""
        raise NotImplementedError

    def paths(self, split):
        """Return the paths of a split's examples (list of str) where each is a file on this machine, otherwise None."""
        return None

    def boxes(self, split, index):
        """What is in example `index` of a split: `boxes.Boxes`. Raises UserError where the source has no boxes."""
        raise self._no_boxes()

    def annotations(self, split):
        """The split as a dict in COCO's format, what detections are evaluated against; image i of it is example i."""
        raise self._no_boxes()

    def _no_boxes(self):
        return UserError(
            f"data.source='{self.spec}' has no boxes: detection takes coco:IMAGES_DIR,ANNOTATIONS.json, a tfds:NAME that has "
            "some, or scenes"
        )

    def labels(self, split):
        """int32[n], -1 for an example without a label; None where finding out would mean reading the images."""
        return as_labels(np.full(self.splits[self.split(split)], -1)) if self.boxed else None

    def classes(self, split):
        """Names of the classes of a split (list of str), or None where it has no labels."""
        self.split(split)
        return None if self.boxed else self.class_names

    def identity(self, split):
        """Text that tells the images of a split from others: what was made of them is kept under it."""
        split = self.split(split)
        return f"{self.spec} {split} {self.splits[split]}"

    def check_labels(self, split_a, split_b):
        """Raises UserError unless both splits are labelled, by the same classes."""
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
                f"({len(b)}): {'; '.join(parts)}: both splits need the same class names"
            )

    def check_labelled(self, split, labels=None):
        """Raise UserError where one of the labels (int [n], of images of the split) is -1; say of which class they are.

        Without labels those that the source knows are looked at, before anything is read.
        """
        labels = self.labels(split) if labels is None else labels
        if labels is None:
            return
        count = int((np.asarray(labels) < 0).sum())
        if not count:
            return
        names = set(self.classes(split) or ()) - set(self.class_names or ())
        what = f" are of the class {sorted(names)[0]!r}, which no split trained on has" if names else " have no label"
        others = f" ({len(names)} such classes: {_first(names)})" if len(names) > 1 else ""
        raise UserError(f"data.source='{self.spec}' split '{split}': {count} images{what}{others}")

    def _labels_hint(self, split):
        return ""


class ArraySource(Source):
    """A source whose splits are whole arrays in memory; a subclass gives `images` and `labels`."""

    def images(self, split):
        """uint8[n, H, W, 3]."""
        raise NotImplementedError

    def fetch(self, split, index):
        split = self.split(split)
        return self.images(split)[index], int(self.labels(split)[index]), f"{self.spec} {split}[{index}]"


def _first(names, count=5):
    names = sorted(names)
    return ", ".join(names[:count]) + (f", ... ({len(names)} in all)" if len(names) > count else "")


def as_labels(values):
    """int32[n], read-only, since every caller gets the same array."""
    labels = np.asarray(values, np.int32)
    labels.flags.writeable = False
    return labels
