"""The tf.data pipeline: runs the examples of a plan on many threads, in the plan's order, ahead of the training loop.

tensorflow gives the threads, the ordering and the prefetching; what runs through its pipeline are the numbers of chunks, while
their examples are put in their places in the batch. What an example looks like is decided in `specs`, without it. With
`processes` the threads only wait for these.
"""

import collections
import concurrent.futures
import os
import threading
import weakref

import numpy as np

from qbheat_jax.data.batches import Batches
from qbheat_jax.data.cpu_tensorflow import tf, untuned
from qbheat_jax.data.jpeg import jpeg_window
from qbheat_jax.data.processes import Decoders
from qbheat_jax.data.specs import image
from qbheat_jax.errors import RUN_FAILED, UserError

# Seconds given to tensorflow's threads to end.
_PATIENCE = 5.0


class TensorflowBatches(Batches):
    """Batches made by `workers` threads (0: one for each core), or by `processes` if any, `prefetch` batches ahead."""

    def __init__(self, plan, workers, prefetch, processes=0):
        super().__init__(plan)
        decoders = None
        if processes:
            decoders = Decoders(plan.spec, plan.slices.chunk, min(processes, os.cpu_count() or 1))
            workers = decoders.ahead
        self._work = _Work(plan, decoders)
        # The threads call back into Python, which they must not do once the interpreter has begun to go: `finalize`
        # runs when this iterator is dropped and, where it never is, before exit.
        self._running = [iter(_dataset(self._work, workers, prefetch))]
        self._close = weakref.finalize(self, _stop, self._work, self._running)

    def _next(self):
        if not self._running:
            raise StopIteration
        # tensorflow begins when it is first asked. It then works ahead, so that it need not be asked to make a batch.
        asked = _asked(self._running[0]) if self.position == self.plan.start else None
        self._work.wait((self.position - self.plan.start) // self.plan.batch_size)
        try:
            last = int((asked.result() if asked else next(self._running[0])).numpy()[-1])
        except tf.errors.OpError:
            self._work.reraise()  # Our own error, rather than tensorflow's account of it.
            raise
        return self._work.batches.pop(last // self.plan.slices.per_batch)

    def close(self):
        self._close()


def _asked(iterator):
    """A future of the iterator's next item."""
    future = concurrent.futures.Future()

    def ask():
        try:
            future.set_result(next(iterator))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=ask, name="qbheat-first-batch", daemon=True).start()
    return future


def _stop(work, running):
    work.end()
    # tensorflow ends once all that its threads have begun is done, and a disk that does not answer leaves that undone.
    iterators = running[:]
    running.clear()
    thread = threading.Thread(target=iterators.clear, daemon=True)
    try:
        thread.start()
        thread.join(_PATIENCE)
    except RuntimeError:  # no thread begins while the interpreter ends
        iterators.clear()


def _dataset(work, workers, prefetch):
    options = tf.data.Options()
    options.deterministic = True
    if workers:
        options.threading.private_threadpool_size = workers
    per_batch = work.plan.slices.per_batch

    def make(j):
        return tf.ensure_shape(tf.numpy_function(work.make, [j], tf.int64, stateful=False), ())

    total = work.plan.batches * per_batch if work.plan.batches is not None else np.iinfo(np.int64).max
    if work.plan.source.random_access:
        chunks = tf.data.Dataset.range(total)
    else:
        chunks = tf.data.Dataset.from_generator(lambda: work.read(total), output_signature=tf.TensorSpec((), tf.int64))
    made = chunks.map(make, num_parallel_calls=workers or os.cpu_count(), deterministic=True)
    return untuned(made.batch(per_batch, drop_remainder=True).prefetch(max(1, prefetch)).with_options(options))


class _Work:
    """What tensorflow's threads run. It must not know the iterator, which would then never be dropped."""

    def __init__(self, plan, decoders):
        self.plan, self.decoders = plan, decoders
        self.stop = threading.Event()
        # Arrays of the batches that are being made, and how many of their chunks are done, by their number.
        self.batches, self._done, self._lock = {}, collections.Counter(), threading.Condition()
        self._error = None
        # Examples of a stream on their way from the reader to the threads that decode them, by chunk.
        self._read = {}

    def reraise(self):
        if self._error is not None:
            raise self._error

    def wait(self, number):
        """Until batch `number` is there or never will be. Unlike a wait for tensorflow, a signal's handler can end it.

        Raises what went wrong in its making.
        """
        if self.plan.batches is not None and number >= self.plan.batches:
            return
        whole = self.plan.slices.per_batch
        with self._lock:
            self._lock.wait_for(lambda: self._done[number] == whole or self._error or self.stop.is_set())
            if self._done.pop(number, 0) < whole:
                self.reraise()

    def end(self):
        self.stop.set()
        if self.decoders:
            self.decoders.close()
        with self._lock:
            self._lock.notify_all()

    def make(self, j):
        """Fills in the examples of chunk j, an int64, which comes back.

        An error is kept for `wait`: raised here, it would be logged by tensorflow, once for each chunk on its way.
        """
        try:
            if not (self.stop.is_set() or self._error):
                self._make(int(j))
                number = int(j) // self.plan.slices.per_batch
                with self._lock:
                    self._done[number] += 1
                    if self._done[number] == self.plan.slices.per_batch:
                        self._lock.notify_all()
        except BaseException as error:
            self._failed(error)
        return j

    def _failed(self, error):
        with self._lock:
            self._error = self._error or error
            self._lock.notify_all()

    def _make(self, j):
        plan = self.plan
        positions = plan.slices.positions(j)
        if plan.source.random_access:
            epochs, indices = plan.order(positions)

            def fetch(_, index):
                return plan.fetch(index)

        else:
            epochs, _ = plan.order.places(positions)
            item = self._read.pop(j)
            indices = np.array([-1 if item is None else item[3]])

            def fetch(_, index):
                return item[:3]

        if self.decoders:
            self.decoders.build(fetch, epochs, indices, plan.bad, self._place(j))
        else:
            image.build(plan.spec, fetch, epochs, indices, plan.bad, jpeg_window, self._place(j))

    def _place(self, j):
        """Where the examples of chunk j go: views of its batch's arrays."""
        slices, spec = self.plan.slices, self.plan.spec
        number, part = divmod(j, slices.per_batch)
        with self._lock:
            if number not in self.batches:
                self.batches[number] = spec.empty(slices.local)
            batch = self.batches[number]
        return {key: array[part * slices.chunk : (part + 1) * slices.chunk] for key, array in batch.items()}

    def read(self, total):
        """Reads a stream source: yields chunk numbers, and keeps what each of them is made from."""
        try:
            epoch, stream = None, None
            for j in range(total):
                if self.stop.is_set():
                    return
                epochs, places = self.plan.order.places(self.plan.slices.positions(j))
                if places[0] < 0:
                    self._read[j] = None
                else:
                    if epoch != epochs[0]:
                        epoch = epochs[0]
                        stream = self._open(int(epoch), int(places[0]))
                    self._read[j] = next(stream, None)
                    if self._read[j] is None:
                        raise UserError(
                            f"data.source='{self.plan.source.spec}' split '{self.plan.split}' ended early in epoch "
                            f"{epoch}: it should have {self.plan.order.n} images; prepare the data set again"
                        )
                yield j
        except tf.errors.OpError as error:  # A file that is gone, or a record that fails its checksum.
            reason = " ".join((error.message or type(error).__name__).split())[:300]
            message = f"data.source='{self.plan.source.spec}' cannot be read: {reason}"
            failure = UserError(message, exit_code=RUN_FAILED)
            failure.__cause__ = error
            self._failed(failure)
        except Exception as error:
            self._failed(error)

    def _open(self, epoch, first):
        plan = self.plan
        # Where an epoch begins within the global batches of this run, so that the reader can keep this process's share.
        shift = epoch * plan.order.padded - plan.start
        return plan.source.stream(
            plan.split,
            seed=plan.spec.seed,
            epoch=epoch,
            shuffle=plan.spec.train,
            first=first,
            keep=(shift, plan.batch_size, plan.slices.rows),
        )
