"""Cache of encoded splits in memory, or in memory-mapped files that outlive the process.

A file cache is a directory DIRECTORY/SPLIT-FINGERPRINT with features.npy, labels.npy, index.npy and about.json. It gets this
name when it is complete, so a killed run leaves no damaged cache. The fingerprint covers everything that the features depend
on. The directory may be deleted whenever no probe runs.
"""

import collections
import hashlib
import json
import logging
import os
import pathlib
import shutil
import socket

import numpy as np

import qbheat_jax
from qbheat_jax import paths, pytree
from qbheat_jax.errors import RUN_FAILED, UserError, writing
from qbheat_jax.probe.features import Features, as_labels

log = logging.getLogger("qbheat")


def weights_digest(variables):
    """Return the SHA-256 of the names, shapes and bits of all arrays of a tree."""
    digest = hashlib.sha256()
    for name, leaf in pytree.names(variables):
        leaf = np.ascontiguousarray(leaf)
        digest.update(f"{name} {leaf.dtype} {leaf.shape}".encode())
        digest.update(leaf.tobytes())
    return digest.hexdigest()


class FeatureCache:
    """Cache of encoded splits. The key is `about`, a JSON dict of everything that the features depend on.

    Several probes may share one cache. Files go to `directory`. Memory holds the most recently used splits, at most
    `cache_gib`.
    """

    def __init__(self, directory):
        self._directory, self._memory, self._figures = str(directory), collections.OrderedDict(), {}

    def get(self, about, n, shape, make, *, in_memory, cache_gib):
        """Return the features of a split from memory or files, or encode them and keep them.

        Args:
          about: key of the cache; has "split".
          n: largest number of examples.
          shape: of one example's features.
          make: function that yields (features float32 [b, ...], labels int32 [b] or masks uint8 [b, S, S], index int [b]).
          in_memory: whether to keep new features in memory instead of files.
          cache_gib: most memory that the cached splits may take.

        Returns:
          (Features, index int64 [N] of each example in its split, whether `make` was called).
        """
        about = {"version": qbheat_jax.__version__, **about}
        name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]
        if name in self._memory:
            self._memory.move_to_end(name)
            return *self._memory[name][1], False
        if not in_memory:
            return self._file(f"{about['split']}-{name}", about, n, shape, make)
        parts = [np.concatenate(column) for column in zip(*make())] or [np.zeros((0, *shape), np.float32), *[[]] * 2]
        entry = Features.of(*parts[:2]), np.asarray(parts[2], np.int64)
        self._memory[name] = about, entry
        while len(self._memory) > 1 and self._bytes() > cache_gib * 2**30:
            self._memory.popitem(last=False)
        return *entry, True

    def figures(self, about, make):
        """Return what `make()` returned for this `about`, a JSON dict; it is called once and its result kept in memory."""
        key = json.dumps(about, sort_keys=True)
        if key not in self._figures:
            self._figures[key] = make()
        return self._figures[key]

    def lookup(self, about, ignore):
        """Return (Features, index) in memory whose `about` equals this one in all keys but `ignore`, or None."""
        wanted = {"version": qbheat_jax.__version__, **about, ignore: None}
        return next((entry for other, entry in self._memory.values() if {**other, ignore: None} == wanted), None)

    def _bytes(self):
        return sum(features.parts[0].nbytes for _, (features, _) in self._memory.values())

    def _file(self, name, about, n, shape, make):
        if paths.remote(self._directory):
            raise UserError(
                f"the features take more memory than config field cache_gib allows, and files of them cannot be mapped "
                f"in {self._directory}: take a --workdir on this machine, raise cache_gib, or take fewer images"
            )
        place = pathlib.Path(self._directory) / name
        found = _read(place, about, shape)
        if found:
            log.info("features of %s taken from %s", about["split"], place)
            return *found, False
        with writing(place, RUN_FAILED):
            _write(place, about, n, shape, make)
        return *_read(place, about, shape), True


def _read(place, about, shape):
    """Return (Features, index) of a complete cache in files with this `about` and shape, or None."""
    try:
        if json.loads((place / "about.json").read_text()) != about:
            return None
        features = np.load(place / "features.npy", mmap_mode="r")
        labels, index = np.load(place / "labels.npy"), np.load(place / "index.npy")
        if features.shape[1:] != tuple(shape) or len(features) < len(labels) or len(labels) != len(index):
            return None
    except (OSError, ValueError):  # missing or unreadable
        return None
    return Features((features,), np.arange(len(labels)), labels), index


def _write(place, about, n, shape, make):
    place.parent.mkdir(parents=True, exist_ok=True)
    _clear(place)
    part = place.with_name(f".{place.name}.{socket.gethostname()}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        labels, index = [], []
        # Written as a stream: a full disk raises an error, which a writable memory map would not.
        with (part / "features.npy").open("wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (n, *shape)}
            np.lib.format.write_array_header_1_0(file, header)
            end = file.tell() + n * int(np.prod(shape)) * 4
            for x, own_labels, own_index in make():
                file.write(np.ascontiguousarray(x, "<f4").data)
                labels.append(own_labels)
                index.append(own_index)
            file.truncate(end)  # unreadable images leave unused rows
            file.flush()
            os.fsync(file.fileno())
        np.save(part / "labels.npy", as_labels(np.concatenate(labels)))
        np.save(part / "index.npy", np.concatenate(index).astype(np.int64))
        (part / "about.json").write_text(json.dumps(about, indent=2, sort_keys=True) + "\n")
        if place.exists():  # damaged, or written by another process meanwhile
            shutil.rmtree(place)
        part.rename(place)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _clear(place):
    """Remove unfinished copies of this cache that dead processes of this machine left."""
    for part in place.parent.glob(f".{place.name}.{socket.gethostname()}.*.part"):
        pid = int(part.name.split(".")[-2])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            shutil.rmtree(part, ignore_errors=True)
        except OSError:  # alive, under another user
            continue
