"""Count and log files that cannot be decoded, and stop the run if there are too many."""

import logging
import threading

from qbheat_jax.errors import RUN_FAILED, UserError
from qbheat_jax.paths import printable

_log = logging.getLogger("qbheat")


class BadFiles:
    """Thread-safe set of skipped files; each process counts those that it met itself.

    Args:
      limit_fraction: fraction of `total` that may be bad, `data.max_bad_fraction`.
      total: number of images in the split.
    """

    def __init__(self, limit_fraction, total):
        self.limit_fraction, self.total = float(limit_fraction), int(total)
        self._names = {}
        self._lock = threading.Lock()

    def add(self, name, reason):
        """Count a file and log a warning, once per name."""
        name = printable(name)
        with self._lock:
            if name in self._names:
                return
            self._names[name] = printable(reason)
        _log.warning("skipped %s: %s", name, printable(reason))

    @property
    def count(self):
        """Number of distinct bad files."""
        return len(self._names)

    @property
    def names(self):
        """Names of the bad files, a tuple in the order of discovery."""
        with self._lock:
            return tuple(self._names)

    def check(self):
        """Check that at most `limit_fraction` of `total` is bad.

        Raises:
          UserError: exit code 1, if more is bad.
        """
        if self.count <= self.limit_fraction * self.total:
            return
        names = self.names
        first = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise UserError(
            f"{len(names)} of {self.total} images ({len(names) / max(1, self.total):.1%}) cannot be decoded, more than "
            f"data.max_bad_fraction={self.limit_fraction:g} allows (first: {first}): repair or remove them (the log has "
            "each reason), or raise data.max_bad_fraction",
            exit_code=RUN_FAILED,
        )
