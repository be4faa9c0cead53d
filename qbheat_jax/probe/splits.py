"""Splits of labelled images for training, choosing and testing, and a source of a subset of another's images."""

import hashlib

import numpy as np

from qbheat_jax.data.sources import base
from qbheat_jax.errors import UserError


def test_split(source):
    """Return the split to test on: test, else val. Raise UserError where the source has no train split or neither."""
    for name in ("test", "val"):
        if name in source.splits and "train" in source.splits:
            return name
    raise UserError(
        f"data.source={source.spec!r} has the splits {', '.join(source.splits)}: a probe needs train and test or val"
    )


def labels(source, split):
    """Return the labels int32 [n] of a split, -1 for none. Read all examples where the source does not list them."""
    known = source.labels(split)
    if known is not None:
        return np.asarray(known)
    found = np.full(source.splits[split], -1, np.int32)
    if source.random_access:
        for index in range(len(found)):
            found[index] = source.fetch(split, index)[1]
        return found
    for _, label, _, index in source.stream(split, seed=0, epoch=0, shuffle=False, first=0, keep=(0, 1, np.arange(1))):
        found[index] = label
    return found


def few(labels, fraction, seed):
    """Return sorted indices of a class-balanced draw from labels int [n], where -1 is never drawn.

    The draw is `fraction` of the labelled images, the same number of each class and at least one. A class with fewer gives
    all.
    """
    classes = np.unique(labels[labels >= 0])
    count = max(1, round(fraction * np.count_nonzero(labels >= 0) / max(1, len(classes))))
    generator = np.random.default_rng((seed, len(labels)))
    drawn = [generator.permutation(np.flatnonzero(labels == c))[:count] for c in classes]
    return np.sort(np.concatenate(drawn)) if drawn else np.zeros(0, np.int64)


def hold_out(n, config, labels=None):
    """Split range(n) into (rows to train on, rows to choose on) by data.holdout, drawn by the seed.

    With labels int [n] the same number of each class is held out, at least one; otherwise rows are drawn from all.

    Raises:
      UserError: one of the two would be empty.
    """
    share, generator = config.data.holdout, np.random.default_rng(config.seed)
    if labels is None:
        order = generator.permutation(n)
        held = order[: round(n * share)]
        if not 0 < len(held) < n:
            raise UserError(f"config field data.holdout={share} leaves {len(held)} of {n} images to choose on")
    else:
        rows = [generator.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]
        least = min(map(len, rows))
        count = max(1, round(share * least))
        if count >= least:
            raise UserError(
                f"config field data.fraction={config.data.fraction} leaves {least} images a class: to train and to "
                "choose on them takes at least 2, and a data.holdout that leaves one; or give a val split"
            )
        held = np.concatenate([r[:count] for r in rows])
    return np.setdiff1d(np.arange(n), held), np.sort(held)


class Subset(base.Source):
    """Some images of another source.

    splits: {name of a split: [(the other's split, indices int [k] or None for all), ...]}.
    """

    def __init__(self, source, splits):
        self.source, self.random_access = source, source.random_access
        self.clips, self.plain, self.mask_names = source.clips, source.plain, source.mask_names
        self._parts = {
            name: [(s, np.arange(source.splits[s]) if rows is None else np.asarray(rows)) for s, rows in parts]
            for name, parts in splits.items()
        }
        counts = {name: sum(len(rows) for _, rows in parts) for name, parts in self._parts.items()}
        super().__init__(source.spec, counts, source.class_names)

    def identity(self, split):
        parts = self._parts[self.split(split)]
        digest = hashlib.sha256(b"".join(np.asarray(rows, np.int64).tobytes() for _, rows in parts)).hexdigest()
        return " ".join([*(self.source.identity(own) for own, _ in parts), digest])

    def fetch(self, split, index):
        return self.source.fetch(*self._place(split, index))

    def clip(self, split, index):
        return self.source.clip(*self._place(split, index))

    def masks(self, split, index):
        return self.source.masks(*self._place(split, index))

    def _place(self, split, index):
        """Return (the other's split, its index) of example `index`."""
        for own, rows in self._parts[self.split(split)]:
            if index < len(rows):
                return own, int(rows[index])
            index -= len(rows)
        raise IndexError(index)

    def name(self, split, index):
        return self.source.name(*self._place(split, index))

    def paths(self, split):
        known = [(self.source.paths(own), rows) for own, rows in self._parts[self.split(split)]]
        return None if any(k is None for k, _ in known) else [k[row] for k, rows in known for row in rows]

    def labels(self, split):
        known = [(self.source.labels(own), rows) for own, rows in self._parts[self.split(split)]]
        return None if any(k is None for k, _ in known) else np.concatenate([k[rows] for k, rows in known])

    def stream(self, split, *, seed, epoch, shuffle, first, keep):
        """As `base.Source.stream`, with places that count the images of this subset alone."""
        shift, period, kept = keep
        mine, place = np.isin(np.arange(period), kept), 0
        for own, rows in self._parts[self.split(split)]:
            wanted = np.zeros(self.source.splits[own], bool)
            wanted[rows] = True
            everything = dict(seed=seed, epoch=epoch, shuffle=shuffle, first=0, keep=(0, 1, np.arange(1)))
            left = len(rows)
            for item in self.source.stream(own, **everything):
                if not wanted[item[3]]:
                    continue
                left -= 1
                if place >= first and mine[(place + shift) % period]:
                    yield item
                place += 1
                if not left:
                    break
