"""Lock a workdir for one run, so that a second run is refused before it writes there.

On a disk the kernel locks the file WORKDIR/.lock, until its holder ends in any way. In a bucket the object WORKDIR/.lock is
the lock. Its holder rewrites it every BEAT seconds, and counts as dead after MISSED beats without a rewrite. Clocks of
different machines are never compared.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time

from qbheat_jax import paths
from qbheat_jax.errors import PREEMPTED, RUN_FAILED, UserError, first_line, writing
from qbheat_jax.train import distributed

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("qbheat")

FILE = ".lock"
BEAT, MISSED = 10.0, 3
# Seconds after which a taker tries again: `state` holds the lock for a moment.
GLANCE = 0.05


@contextlib.contextmanager
def held(workdir):
    """Hold the lock of a workdir for the `with` block, and create the workdir if needed.

    Process 0 holds it for all processes of the run. On a disk the file then says how the run ended, see `state`.

    Raises:
      UserError: in every process, if another run holds the workdir or it cannot be written.
    """
    release = distributed.first(lambda: _take(str(workdir)))
    ended = {}
    try:
        yield
        ended = {"ended": "finished"}
    except BaseException as error:
        stopped = not isinstance(error, Exception) or getattr(error, "exit_code", None) == PREEMPTED
        ended = {"ended": "killed" if stopped else "failed", "reason": first_line(error)}
        raise
    finally:
        if release:
            release(ended)


def state(workdir):
    """Return (state, reason) of the last command that held a workdir on a disk.

    The state is "running", "finished", "failed" or "killed"; "" where there is no lock file. A command counts as killed if
    it was interrupted or ended without a word. The reason is the first line of its error, else "".
    """
    try:
        with open(os.path.join(workdir, FILE), encoding="utf-8", errors="replace") as file:
            said = _dict(file.read())
            if fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # released when the file is closed
                except BlockingIOError:
                    return "running", ""
                except OSError:  # this disk has no locks
                    pass
    except OSError:
        return "", ""
    ended, reason = said.get("ended"), said.get("reason", "")
    return (ended, str(reason)) if ended in ("finished", "failed") else ("killed", "")


def _take(workdir):
    """Take the lock, and return a function that releases it."""
    with writing(f"--workdir {workdir}", RUN_FAILED):
        return _bucket(workdir) if paths.remote(workdir) else _flock(workdir)


def _flock(workdir):
    os.makedirs(workdir, exist_ok=True)
    file = open(os.path.join(workdir, FILE), "a+")  # NFS locks only files that are open for writing
    try:
        if fcntl is None:
            raise OSError("this system has no flock")
        _exclusive(file)
    except (BlockingIOError, PermissionError):
        with file:
            file.seek(0)
            raise _refusal(workdir, file.read()) from None
    except OSError as error:
        _warn(workdir, error.strerror or error)
    holder = _holder()
    try:
        _rewrite(file, holder)
    except OSError:
        file.close()
        raise

    def release(ended):
        with contextlib.suppress(OSError), file:  # such as a disk that is full by now
            _rewrite(file, holder | ended)

    return release


def _exclusive(file):
    """Lock an open file. Raise BlockingIOError where another process holds it."""
    for last in (False, True):
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if last:
                raise
            time.sleep(GLANCE)


def _rewrite(file, content):
    file.truncate(0)
    file.write(json.dumps(content) + "\n")
    file.flush()


def _warn(workdir, reason):
    log.warning("%s cannot be locked (%s): make sure that no other run uses this workdir", workdir, reason)


def _bucket(workdir):
    import tensorstore

    try:
        store = tensorstore.KvStore.open(workdir.rstrip("/") + "/").result()
    except ValueError as error:  # tensorstore does not know this kind of bucket
        _warn(workdir, first_line(error, 300))
        return None
    return _Beating(workdir, store).release


class _Beating:
    """The lock of a bucket: an object that a thread rewrites, each time only if nobody else has.

    Args:
      workdir: its address, for messages.
      store: the `tensorstore.KvStore` of the workdir.
      lost: called with the error, in that thread, if another run has taken the lock.
    """

    def __init__(self, workdir, store, lost=None):
        self._workdir, self._store, self._lost = workdir, store, lost or _leave
        self._me, self._beats = _holder(), 0
        try:
            before = self._store.read(FILE).result()
            if before.state == "value":
                before = self._watch(before)
            self._generation = before.stamp.generation
            if not self._write():
                raise _refusal(workdir, self._store.read(FILE).result().value)
        except (ValueError, RuntimeError) as error:  # from tensorstore: no such bucket, or no access
            raise OSError(first_line(error, 300)) from error
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="qbheat-lock", daemon=True)
        self._thread.start()

    def release(self, ended=None):
        """Stop the thread, and delete the lock if this run still holds it."""
        self._end.set()
        self._thread.join(BEAT)
        with contextlib.suppress(ValueError, RuntimeError):
            self._store.write(FILE, None, if_equal=self._generation).result()

    def _watch(self, before):
        """Wait for a rewrite by the holder; return the unchanged object if there was none."""
        log.info(
            "%s: waiting up to %g s for a rewrite of the lock by %s",
            self._workdir,
            MISSED * BEAT,
            _holder_text(before.value),
        )
        until = time.monotonic() + MISSED * BEAT
        while time.monotonic() < until:
            time.sleep(BEAT / 10)
            now = self._store.read(FILE).result()
            if now.state != "value":
                return now
            if now.stamp.generation != before.stamp.generation:
                raise _refusal(self._workdir, now.value)
        return before

    def _write(self):
        """Write the object if it still has the generation last seen; return whether it was written."""
        self._beats += 1
        text = json.dumps({**self._me, "beats": self._beats})
        generation = self._store.write(FILE, text, if_equal=self._generation).result().generation
        if generation:
            self._generation = generation
        return bool(generation)

    def _beat(self):
        while not self._end.wait(BEAT):
            try:
                if self._write():
                    continue
                now = self._store.read(FILE).result()
                if now.state == "value" and _parsed(now.value) != self._me:
                    self._lost(_refusal(self._workdir, now.value))
                    return
                self._generation = now.stamp.generation  # our own write, whose answer from the bucket was lost
            except (ValueError, RuntimeError) as error:
                log.warning("%s: the lock could not be written (%s)", self._workdir, first_line(error, 300))


def _leave(error):
    """End the process at once, because two runs would destroy each other's checkpoints."""
    log.error("%s; this run held the lock, failed to renew it for %g s, and ends now", error, MISSED * BEAT)
    os._exit(RUN_FAILED)


def _holder():
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}


def _parsed(text):
    """Parse a lock's text to the dict of `_holder`; {} if it is incomplete."""
    said, names = _dict(text), ("pid", "host", "since")
    return {name: said[name] for name in names} if said.keys() >= set(names) else {}


def _dict(text):
    """Parse a dict of JSON; {} for any other text."""
    try:
        said = json.loads(text)
    except (ValueError, TypeError):
        return {}
    return said if isinstance(said, dict) else {}


def _holder_text(text):
    return "process {pid} on {host} (since {since})".format(**_parsed(text)) if _parsed(text) else "its holder"


def _refusal(workdir, text):
    holder = _holder_text(text) if _parsed(text) else "another run"
    return UserError(f"--workdir {workdir} is in use by {holder}: wait until it ends, or give another --workdir")
