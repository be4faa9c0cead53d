"""The `har:PATH[,STRIDE[,OFFSET]]` source: clips of paired RGB and event frames in HARDVS's layout (arXiv 2504.05830).

    PATH/{train,val,test}_label.txt    one line `DIR FRAMES LABEL` a clip
    PATH/DIR_aps/00000000.png          RGB frames
    PATH/DIR_dvs/00000000.png          event frames, one for each RGB frame

The two folders may also lie in DIR: DIR/NAME_aps and DIR/NAME_dvs, with NAME the last part of DIR. A DIR that ends in _aps or
_dvs means both. DIR is relative to PATH, or absolute. FRAMES counts the frames of each folder. Frame n, from 0, is the file
STRIDE x n + OFFSET: STRIDE is 5 in HARDVS, the default, and 1 in PokerEvent. LABEL is a whole number.

Opening the source reads the lists alone. A clip with a missing or damaged frame is skipped and counted when it is read.
"""

import functools
import hashlib
import itertools
import os
import re

import numpy as np

from qbheat_jax import paths
from qbheat_jax.data import augment, decode
from qbheat_jax.data.clip import MODALITIES, Clip
from qbheat_jax.data.sources import base, files
from qbheat_jax.errors import UserError

SPLITS = ("train", "val", "test")
ENDINGS = ("_aps", "_dvs")
_STRIDE = 5
_NUMBER = re.compile(r"[0-9]{1,9}")
_ACCEPTED = "har:PATH, har:PATH,STRIDE or har:PATH,STRIDE,OFFSET, with a STRIDE of at least 1"


class Har(base.Source):
    """Clips by the lists of a folder. The classes are the labels of train, or of the first split if there is no train list.

    A label that only another split has becomes -1 there, and `check_labels` reports it.
    """

    clips = True

    def __init__(self, spec):
        path, *numbers = spec.partition(":")[2].split(",")
        if not path or len(numbers) > 2 or not all(map(_NUMBER.fullmatch, numbers)) or int((numbers or [1])[0]) < 1:
            raise UserError(f"data.source='{spec}' is not accepted: it takes {_ACCEPTED}")
        self.path = paths.expand(path, f"data.source='{spec}'")
        self._stride, self._offset = (int(n) for n in (*numbers, *(_STRIDE, 0)[len(numbers) :]))
        self._clips = {}  # {split: [(DIR, FRAMES, LABEL), ...]}
        for split in SPLITS:
            file = files.join(self.path, f"{split}_label.txt")
            text = _text(spec, file)
            if text is not None:
                self._clips[split] = list(_lines(spec, file, text))
        if not self._clips:
            raise UserError(
                f"data.source='{spec}': {self.path} has no train_label.txt, val_label.txt or test_label.txt"
            )
        for split, clips in self._clips.items():
            self._check_folders(spec, split, clips)

        labels = {split: np.array([label for *_, label in clips]) for split, clips in self._clips.items()}
        known = np.unique(labels.get("train", next(iter(labels.values()))))
        super().__init__(
            spec, {split: len(clips) for split, clips in self._clips.items()}, list(map(str, known.tolist()))
        )
        self._labels, self._classes = {}, {}
        for split, values in labels.items():
            place = np.searchsorted(known, values)
            place[place == len(known)] = 0
            self._labels[split] = base.as_labels(np.where(known[place] == values, place, -1))
            self._classes[split] = self.class_names + list(map(str, np.setdiff1d(values, known).tolist()))
        self.notes = tuple(_notes(spec, self._clips, known))

    def labels(self, split):
        return self._labels[self.split(split)]

    def classes(self, split):
        return self._classes[self.split(split)]

    def identity(self, split):
        """Return the cache key, which depends on the list, the numbers of frames and, on a disk, the folders' times."""
        digest = hashlib.sha256(f"{self._stride} {self._offset}\n".encode())
        for folder, count, label in self._clips[self.split(split)]:
            times = (files.fingerprint(one) for one in self._folders(folder) or ())
            digest.update(os.fsencode(f"{folder} {count} {label} ") + b" ".join(times) + b"\n")
        return f"{super().identity(split)} {digest.hexdigest()}"

    def clip(self, split, index):
        split = self.split(split)
        folder, count, _ = self._clips[split][index]
        read = functools.partial(self._read, folder, count)
        return Clip(count, int(self._labels[split][index]), files.join(self.path, folder), read)

    def fetch(self, split, index):
        """Return (encoded bytes of the middle RGB frame, label, name). Raise `decode.BadImage` if a file is missing."""
        clip = self.clip(split, index)
        middle = augment.one_of_each_segment(clip.count, np.full(1, 0.5)).tolist()
        return self._read(*self._clips[self.split(split)][index][:2], middle, 1)[0][0], clip.label, clip.name

    def _read(self, folder, count, numbers, modalities=2):
        """Return the contents [(RGB, event), ...] of a clip's frames; [(RGB,), ...] for one modality."""
        pair = self._folders(folder)
        if pair is None:
            raise decode.BadImage(f"neither {' nor '.join(pair[0] for pair in self._places(folder))} is a folder")
        names = (f"{self._stride * number + self._offset:08}.png" for number in numbers)
        try:
            return [tuple(files.read(files.join(one, name)) for one in pair[:modalities]) for name in names]
        except FileNotFoundError as error:
            have = " and ".join(f"{_count(one):,} {modality}" for one, modality in zip(pair, MODALITIES))
            missing = error.filename or "a file"
            raise decode.BadImage(
                f"{missing} is missing; {count:,} frames are listed, {have} frames are there"
            ) from error

    def _places(self, folder):
        """Return the pairs of folders (RGB, events) in which the frames of a list's DIR may lie."""
        whole = files.join(self.path, folder.rstrip("/"))
        stem = whole[: -len(ENDINGS[0])] if whole.endswith(ENDINGS) else whole
        inside = files.join(whole, stem.rpartition("/")[2])
        return [tuple(f"{start}{ending}" for ending in ENDINGS) for start in (stem, inside)]

    def _folders(self, folder):
        """Return the pair of folders of a list's DIR; None if there is no folder of RGB frames."""
        return next((pair for pair in self._places(folder) if files.exists(pair[0])), None)

    def _check_folders(self, spec, split, clips):
        """Raise UserError if the list is not of this folder: no clip has a folder of RGB frames."""
        if not any(self._folders(folder) for folder, *_ in clips):
            looked = " or ".join(pair[0] for pair in self._places(clips[0][0]))
            raise UserError(
                f"data.source='{spec}': none of the {len(clips):,} clips of {split}_label.txt has its folder of RGB frames "
                f"(first: {looked})"
            )


def _text(spec, file):
    """Return the text of a list, or None if there is no such file."""
    try:
        return files.read(file).decode("utf-8-sig") if files.exists(file) else None
    except (OSError, ImportError, ValueError) as error:  # no permission; no bucket client or login; no text
        raise UserError(f"data.source='{spec}': {file} cannot be read: {error}") from error


def _lines(spec, file, text):
    """Yield (DIR, FRAMES, LABEL) of a list's lines. Raise UserError for a line that is not one, and for an empty list."""
    empty = True
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        folder, *numbers = line.strip().rsplit(maxsplit=2)
        if len(numbers) < 2 or not all(map(_NUMBER.fullmatch, numbers)) or int(numbers[0]) < 1:
            raise UserError(
                f"data.source='{spec}': {file} line {number} is {line.strip()[:100]!r}: it takes DIR FRAMES LABEL, with a "
                "number of frames above 0 and a whole number as label"
            )
        yield folder, int(numbers[0]), int(numbers[1])
        empty = False
    if empty:
        raise UserError(f"data.source='{spec}': {file} lists no clips: fill it or remove it")


def _notes(spec, clips, known):
    """Yield sentences on labels that no training clip has, and on clips of two lists."""
    gaps = known.max() + 1 - len(known)
    if gaps:
        there = set(known.tolist())
        first = next(label for label in itertools.count() if label not in there)
        yield f"data.source='{spec}': {gaps:,} labels below {known.max()} have no clips and are no classes (first: {first})"
    names = {split: {folder for folder, *_ in listed} for split, listed in clips.items()}
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        both = names.get(a, set()) & names.get(b, set())
        if both:
            yield (
                f"data.source='{spec}': {len(both):,} clips are in {a}_label.txt and {b}_label.txt (first: "
                f"{paths.printable(min(both))})"
            )


def _count(folder):
    try:
        return sum(name.endswith(".png") for name in files.scan(folder)[1])
    except OSError:
        return 0
