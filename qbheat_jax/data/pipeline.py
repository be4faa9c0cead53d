"""The tf.data pipeline: runs the examples of a plan on many threads, in the plan's order, ahead of the training loop.

tensorflow gives the threads, the ordering and the prefetching; what runs through its pipeline are the numbers of chunks, while
their examples are put in their places in the batch. What an example looks like is decided in `examples`, without it. With
`processes` the threads only wait for these.
"""

import os
import threading
import weakref

import numpy as np

from qbheat_jax.data import examples
from qbheat_jax.data.batches import Batches
from qbheat_jax.data.cpu_tensorflow import tf, untuned
from qbheat_jax.data.jpeg import jpeg_window
from qbheat_jax.data.processes import Decoders
from qbheat_jax.errors import RUN_FAILED, UserError


class TensorflowBatches(Batches):
    """Batches made by `workers` threads (0: one for each core), or by `processes` if any, `prefetch` batches ahead."""

    def __init__(self, plan, workers, prefetch, processes=0):
        super().__init__(plan)
        decoders = None
        if processes:
            decoders = Decoders(plan.recipe, plan.slices.chunk, min(processes, os.cpu_count() or 1))
            workers = decoders.ahead
        self._work = _Work(plan, decoders)
        # The threads call back into Python, which they must not do once the interpreter has begun to go: `finalize`
        # runs when this iterator is dropped and, where it never is, before exit.
        self._running = [iter(_dataset(self._work, workers, prefetch))]
        self._close = weakref.finalize(self, _stop, self._work, self._running)

    def _next(self):
        if not self._running:
            raise StopIteration
        try:
            last = int(next(self._running[0]).numpy()[-1])
        except StopIteration:
            self._work.reraise()
            raise
        except tf.errors.OpError:
            self._work.reraise()  # Our own error, rather than tensorflow's account of it.
            raise
        return self._work.batches.pop(last // self.plan.slices.per_batch)

    def close(self):
        self._close()


def _stop(work, running):
    work.stop.set()
    running.clear()
    if work.decoders:
        work.decoders.close()


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
        # Arrays of the batches that are being made, by their number.
        self.batches, self._lock = {}, threading.Lock()
        self._error = None
        # Examples of a stream on their way from the reader to the threads that decode them, by chunk.
        self._read = {}

    def reraise(self):
        if self._error is not None:
            raise self._error

    def make(self, j):
        """Fills in the examples of chunk j, an int64, which comes back."""
        try:
            if not self.stop.is_set():
                self._make(int(j))
            return j
        except BaseException as error:
            self._error = self._error or error
            raise

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
            examples.build(plan.recipe, fetch, epochs, indices, plan.bad, jpeg_window, self._place(j))

    def _place(self, j):
        """Where the examples of chunk j go: views of its batch's arrays."""
        slices, recipe = self.plan.slices, self.plan.recipe
        number, part = divmod(j, slices.per_batch)
        with self._lock:
            if number not in self.batches:
                self.batches[number] = recipe.empty(slices.local)
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
            self._error = UserError(message, exit_code=RUN_FAILED)
            raise self._error from error
        except BaseException as error:
            self._error = self._error or error
            raise

    def _open(self, epoch, first):
        plan = self.plan
        # Where an epoch begins within the global batches of this run, so that the reader can keep this process's share.
        shift = epoch * plan.order.padded - plan.start
        return plan.source.stream(
            plan.split,
            seed=plan.recipe.seed,
            epoch=epoch,
            shuffle=plan.recipe.train,
            first=first,
            keep=(shift, plan.batch_size, plan.slices.rows),
        )
