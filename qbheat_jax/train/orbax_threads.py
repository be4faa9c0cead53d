"""Silence orbax's threads when a checkpoint cannot be read or written: the error is raised and reported once."""

import asyncio
import logging
import os
import threading


class _Loop(asyncio.SelectorEventLoop):
    """An event loop that finishes its tasks before it closes."""

    def close(self):
        if not self.is_closed() and not self.is_running():
            pending = asyncio.all_tasks(self)
            if pending:
                self.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
        super().close()


class _TidyLoops:
    """Context manager: new event loops are a `_Loop`. It may be entered several times, in any order.

    When one array of a checkpoint fails, orbax closes its loop while other arrays are still in progress. tensorstore then
    reports each of these to a closed loop, with a traceback on stderr.
    """

    def __init__(self):
        self._within, self._before, self._lock = 0, None, threading.Lock()

    def __enter__(self):
        with self._lock:
            self._within += 1
            if self._within == 1:
                self._before, asyncio.new_event_loop = asyncio.new_event_loop, _Loop
        return self

    def __exit__(self, *_):
        with self._lock:
            self._within -= 1
            if not self._within:
                asyncio.new_event_loop = self._before


tidy_loops = _TidyLoops()


def _is_no_failure_of_orbax(record):
    """Return whether to show a log record; orbax's exceptions are raised to the caller instead."""
    return not (record.exc_info and "orbax" in record.pathname) or bool(os.environ.get("QBHEAT_DEBUG"))


logging.getLogger("absl").addFilter(_is_no_failure_of_orbax)
