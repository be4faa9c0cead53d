"""Files that cannot be decoded: counted, named once in the log, and the end of the run where they are too many."""

import logging
import threading

from qbheat_jax.errors import RUN_FAILED, UserError
from qbheat_jax.paths import printable

_log = logging.getLogger("qbheat")


class BadFiles:
    """Thread-safe set of the files that were skipped.

    `limit_fraction`: the share of `total` (the images of the split) that may be bad, `data.max_bad_fraction`.
    Each process counts the files that it met itself.
    """

    def __init__(self, limit_fraction, total):
        self.limit_fraction, self.total = float(limit_fraction), int(total)
        self._names = {}
        self._lock = threading.Lock()

    def add(self, name, reason):
        """Counts the file `name` (str) and logs one warning; a file seen before is neither counted nor logged."""
        name = printable(name)
        with self._lock:
            if name in self._names:
                return
            self._names[name] = printable(reason)
        _log.warning("skipped %s: %s", name, printable(reason))

    @property
    def count(self):
        """int: the number of distinct bad files."""
        return len(self._names)

    @property
    def names(self):
        """tuple of str: the bad files, in the order in which they were met."""
        with self._lock:
            return tuple(self._names)

    def check(self):
        """Raises UserError (exit code 1) where more than `limit_fraction` of `total` is bad."""
        if self.count <= self.limit_fraction * self.total:
            return
        names = self.names
        first = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise UserError(
            f"{len(names)} of {self.total} images ({len(names) / max(1, self.total):.1%}) cannot be decoded, more than "
            f"data.max_bad_fraction={self.limit_fraction:g} allows (first: {first}): repair or remove them (the log "
            "gives each one's reason), or raise data.max_bad_fraction",
            exit_code=RUN_FAILED,
        )
