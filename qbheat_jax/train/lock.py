"""Lock a workdir for one run: a second run is refused before it touches a file there.

On a disk the kernel locks the file WORKDIR/.lock. The lock ends with its holder, however that ends. In a bucket the object
WORKDIR/.lock is the lock. Its holder writes it anew every BEAT seconds, and counts as dead once MISSED beats have not come.
Clocks of two machines are never compared.
"""

import contextlib
import json
import logging
import os
import socket
import threading
import time

from qbheat_jax import paths
from qbheat_jax.errors import RUN_FAILED, UserError, first_line, writing
from qbheat_jax.train import distributed

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

log = logging.getLogger("qbheat")

FILE = ".lock"
BEAT, MISSED = 10.0, 3


@contextlib.contextmanager
def held(workdir):
    """Hold the workdir, which is made where there is none, for the length of a `with` block.

    Process 0 holds it for all processes of the run.

    Raises:
      UserError: In every process, where another run holds the workdir, or the workdir cannot be written.
    """
    release = distributed.first(lambda: _take(str(workdir)))
    try:
        yield
    finally:
        if release:
            release()


def _take(workdir):
    """Take the lock, and return the function that gives it back."""
    with writing(f"--workdir {workdir}", RUN_FAILED):
        return _bucket(workdir) if paths.remote(workdir) else _flock(workdir)


def _flock(workdir):
    os.makedirs(workdir, exist_ok=True)
    file = open(os.path.join(workdir, FILE), "a+")  # open for writing, as NFS demands it
    try:
        if fcntl is None:
            raise OSError("this system has no flock")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        with file:
            file.seek(0)
            raise _refusal(workdir, file.read()) from None
    except OSError as error:
        _warn(workdir, error.strerror or error)
    try:
        file.truncate(0)
        file.write(json.dumps(_holder()) + "\n")
        file.flush()
    except OSError:
        file.close()
        raise
    return file.close


def _warn(workdir, reason):
    log.warning("%s cannot be locked (%s): let no other run use this workdir", workdir, reason)


def _bucket(workdir):
    import tensorstore

    try:
        store = tensorstore.KvStore.open(workdir.rstrip("/") + "/").result()
    except ValueError as error:  # tensorstore knows no such buckets
        _warn(workdir, first_line(error, 300))
        return None
    return _Beating(workdir, store).release


class _Beating:
    """The lock of a bucket: an object that a thread writes anew, each time on condition that nobody else has.

    store: the `tensorstore.KvStore` of the workdir.
    lost: called, in that thread, where another run has taken the workdir all the same.
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
        except (ValueError, RuntimeError) as error:  # of tensorstore: a bucket that is not there, or not ours
            raise OSError(first_line(error, 300)) from error
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="qbheat-lock", daemon=True)
        self._thread.start()

    def release(self):
        self._end.set()
        self._thread.join(BEAT)
        with contextlib.suppress(ValueError, RuntimeError):
            self._store.write(FILE, None, if_equal=self._generation).result()

    def _watch(self, before):
        """Wait for a sign of life of the holder, and return the object as it is when there has been none."""
        log.info("%s: waiting up to %g s for a sign of %s", self._workdir, MISSED * BEAT, _words(before.value))
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
        """Write the object where it still is of the generation that we know -> whether it was."""
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
                self._generation = now.stamp.generation  # our own, of which the bucket's answer was lost
            except (ValueError, RuntimeError) as error:
                log.warning("%s: the lock could not be written (%s)", self._workdir, first_line(error, 300))


def _leave(error):
    """End the process at once: two runs would destroy each other's checkpoints."""
    log.error("%s; this run held it before, was not heard of for %g s, and ends", error, MISSED * BEAT)
    os._exit(RUN_FAILED)


def _holder():
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}


def _parsed(text):
    """What `_holder` said, of the text of a lock; {} where it is torn."""
    try:
        said = json.loads(text)
        return {name: said[name] for name in ("pid", "host", "since")}
    except (ValueError, KeyError, TypeError):
        return {}


def _words(text):
    return "process {pid} on {host} (since {since})".format(**_parsed(text)) if _parsed(text) else "its holder"


def _refusal(workdir, text):
    holder = _words(text) if _parsed(text) else "another run"
    return UserError(f"--workdir {workdir} is in use by {holder}: wait for its end, or take another --workdir")
