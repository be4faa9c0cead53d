"""Examples made in processes of their own: threads share one interpreter, which some two thousand images a second keep busy.

The process of the training loop reads the files and hands them over; what it gets back are arrays in shared memory. Which
examples there are, and in which order, is decided where it always is.
"""

import atexit
import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import traceback

import numpy as np

from qbheat_jax.data import decode
from qbheat_jax.data.specs import image
from qbheat_jax.errors import RUN_FAILED, UserError

# Bytes of memory shared for the encoded files of a chunk, for each of its images; what does not fit goes through a pipe.
_ENCODED = 160 * 1024


class Decoders:
    """`count` processes that make chunks of `chunk` examples of a data spec.

    Each has a pipe of its own, so that one which is killed is noticed at once and holds no lock that others wait for.

    `ahead`: how many chunks can be asked for at a time, one in the work of each process and one waiting for it.
    """

    def __init__(self, spec, chunk, count):
        self.ahead = 2 * count
        layout = _Layout(spec, chunk)
        context = multiprocessing.get_context("spawn")  # neither jax nor tensorflow outlives a fork
        memory = context.RawArray("B", self.ahead * layout.size)
        self._slots = [layout.slot(memory, k) for k in range(self.ahead)]
        self._free, self._idle = queue.SimpleQueue(), queue.SimpleQueue()  # slots; pipes of processes, None at the end
        for k in range(self.ahead):
            self._free.put(k)
        self.processes = []
        atexit.register(self.close)  # before multiprocessing's own, which would wait for the processes
        for _ in range(count):
            pipe, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, spec, layout, memory), daemon=True)
            with _signals_kept_from_children():
                process.start()
            theirs.close()  # so that the death of the process closes the pipe
            self.processes.append(process)
            self._idle.put(pipe)

    def build(self, fetch, epochs, indices, bad, out):
        """As `image.build`, in another process. Raises UserError where one has died."""
        items = [None if index < 0 else _fetched(fetch, k, index) for k, index in enumerate(indices.tolist())]
        number = self._free.get()
        try:
            encoded, made = self._slots[number]
            for name, reason in self._ask((number, epochs, indices, _put(items, encoded))):
                bad.add(name, reason)
            for key, array in made.items():
                out[key][:] = array
        finally:
            self._free.put(number)

    def _ask(self, task):
        """What the next idle process answers."""
        pipe = self._idle.get()
        try:
            if pipe is None:
                raise EOFError
            pipe.send(task)
            failed, answer = pipe.recv()
        except (EOFError, OSError) as error:
            self.close()
            raise UserError(
                "a process that decodes images has died, perhaps for want of memory: start again, with fewer of them "
                "(data.processes) or none",
                exit_code=RUN_FAILED,
            ) from error
        self._idle.put(pipe)
        if failed:
            raise RuntimeError(f"in a process that decodes images: {answer}")
        return answer

    def close(self):
        """End the processes, and whatever waits for them."""
        atexit.unregister(self.close)
        self._idle.put(None)
        for process in self.processes:
            process.kill()  # they heed nothing less, and have nothing to tidy up


@contextlib.contextmanager
def _signals_kept_from_children():
    """Block what stops a run, in processes started meanwhile too: these end when the run has no more use for them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Layout:
    """How a slot of the shared memory is divided: encoded files, then the arrays of a chunk, each beginning at 64 bytes."""

    def __init__(self, spec, chunk):
        self.chunk, self.encoded = chunk, chunk * _ENCODED
        self.arrays, self.size = {}, self.encoded
        for key, array in spec.empty(chunk).items():
            self.arrays[key] = (self.size, array.shape, array.dtype)
            self.size += -(-array.nbytes // 64) * 64

    def slot(self, memory, k):
        """(uint8[encoded], {key: array of the chunk}), views of slot k."""
        whole = np.frombuffer(memory, np.uint8, self.size, k * self.size)
        return whole[: self.encoded], {
            key: np.ndarray(shape, dtype, whole, offset) for key, (offset, shape, dtype) in self.arrays.items()
        }


def _fetched(fetch, k, index):
    """(data, label, name) of an example, or the error that came instead and makes a bad file of it."""
    try:
        return fetch(k, index)
    except (OSError, decode.BadImage) as error:
        return error


def _put(items, memory):
    """Items with bytes moved to `memory`, as far as it goes; (from, to) in it then stands for them."""
    end, put = 0, []
    for item in items:
        if isinstance(item, tuple) and isinstance(item[0], bytes) and end + len(item[0]) <= len(memory):
            begin, end = end, end + len(item[0])
            memory[begin:end] = np.frombuffer(item[0], np.uint8)
            item = ((begin, end), *item[1:])
        put.append(item)
    return put


# --- In the other process --------------------------------------------------------------------------------------------


class _Noted(list):
    """Stands in for `BadFiles`."""

    def add(self, name, reason):
        self.append((str(name), str(reason)))


def _serve(pipe, spec, layout, memory):
    """Makes chunks until this process is killed, or the one that began it ends, however that ends."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    from qbheat_jax.data.jpeg import jpeg_window

    blank = spec.empty(layout.chunk)

    def make(number, epochs, indices, items):
        encoded, made = layout.slot(memory, number)

        def fetch(k, _):
            if isinstance(items[k], Exception):
                raise items[k]
            data, *others = items[k]
            return (encoded[slice(*data)].tobytes() if isinstance(data, tuple) else data), *others

        bad = _Noted()
        for key in blank.keys() - spec.images:
            made[key][:] = blank[key]
        image.build(spec, fetch, epochs, indices, bad, jpeg_window, made)
        for key in spec.images:
            made[key][~made["mask"]] = blank[key][0]
        return list(bad)

    with contextlib.suppress(EOFError, OSError):  # of a pipe whose other end is gone
        while True:
            task = pipe.recv()
            try:
                answer = False, make(*task)
            except Exception:
                answer = True, traceback.format_exc()
            pipe.send(answer)
    os._exit(1)  # at once: tensorflow would take its time, and there is nothing to tidy up


def _end_with_parent():
    with contextlib.suppress(Exception):
        multiprocessing.parent_process().join()
    os._exit(1)
