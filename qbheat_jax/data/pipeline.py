"""The tf.data pipeline: makes batches ahead of the training loop, in the plan's order, on tensorflow's threads.

Python draws the random numbers of a batch, all examples together. tensorflow's own operations read the files of JPEGs, decode
the crops and resize them, so no interpreter limits how many cores take part. Python makes what they cannot: other formats,
turned or damaged images, examples with boxes, sources of arrays.
"""

import contextlib
import itertools
import os
import queue
import threading
import weakref

import numpy as np
from PIL import Image

from qbheat_jax.data import decode, jpeg
from qbheat_jax.data.batches import Batches
from qbheat_jax.data.cpu_tensorflow import tf, untuned
from qbheat_jax.data.sources.base import ArraySource
from qbheat_jax.data.specs import image
from qbheat_jax.errors import RUN_FAILED, UserError

# Seconds given to tensorflow's threads to end.
_PATIENCE = 5.0
# Endings of files that are not even tried as JPEGs.
_OTHERS = {ending for ending, kind in Image.registered_extensions().items() if kind not in ("JPEG", "MPO")}


class TensorflowBatches(Batches):
    """Batches made by `workers` threads (0: one for each core), `prefetch` batches ahead."""

    def __init__(self, plan, workers, prefetch):
        super().__init__(plan)
        self._work, self._wanted, self._made = _Work(plan), queue.SimpleQueue(), queue.SimpleQueue()
        running = [dataset(self._work, workers, prefetch).as_numpy_iterator()]
        # tensorflow is waited for in a thread of its own: a signal's handler can end a wait for a queue.
        arguments = (self._work, running, self._wanted, self._made)
        self._thread = threading.Thread(target=_serve, args=arguments, name="qbheat-batches", daemon=True)
        # The threads call back into Python, which they must not do once the interpreter has begun to go: `finalize`
        # runs when this iterator is dropped and, where it never is, before exit.
        self._close = weakref.finalize(self, _stop, *arguments, self._thread)

    def _next(self):
        if self._work.stop.is_set():
            raise StopIteration
        if not self._thread.ident:
            self._thread.start()
        self._wanted.put(True)
        made = self._made.get()
        if isinstance(made, BaseException):
            raise made
        return {key: array.reshape(-1, *array.shape[2:]) for key, array in made.items()}

    def close(self):
        self._close()


def _serve(work, running, wanted, made):
    """Answer every request in the queue `wanted` with a batch, or the error that came instead, in the queue `made`."""
    while wanted.get():
        try:
            batch = next(running[0])
            if work.error:
                raise work.error
            work.forget(batch.pop("number"))
        except BaseException as error:  # `work.error` is ours; tensorflow gives its own account of it.
            made.put(work.error or error)
        else:
            made.put(batch)


def _stop(work, running, wanted, made, thread):
    work.stop.set()
    wanted.put(False)
    made.put(StopIteration())

    # tensorflow ends once all that its threads have begun is done, and a disk that does not answer leaves that undone.
    def end():
        if thread.ident:
            thread.join()
        running.clear()

    ending = threading.Thread(target=end, daemon=True)
    try:
        ending.start()
        ending.join(_PATIENCE)
    except RuntimeError:  # no thread begins while the interpreter ends
        running.clear()


def dataset(work, workers, prefetch):
    """Return the tf.data.Dataset of a `_Work`: batches, a dict of tensors [chunks, examples of each, ...]."""
    options = tf.data.Options()
    options.deterministic = True
    options.threading.max_intra_op_parallelism = 1
    if workers:
        options.threading.private_threadpool_size = workers
    batches = tf.data.Dataset.from_generator(work.batches, output_signature=work.signature())
    made = batches.unbatch().map(work.make, num_parallel_calls=workers or os.cpu_count(), deterministic=True)
    made = made.batch(work.plan.slices.per_batch, drop_remainder=True).prefetch(max(1, prefetch))
    return untuned(made.with_options(options))


class _Work:
    """The functions that tensorflow's threads run. A reference to the iterator here would keep it alive for ever.

    `error`: a Python error outside of single files. It is kept instead of raised, because tensorflow would log it once for
    each chunk on its way.
    """

    def __init__(self, plan):
        self.plan = plan
        self.stop, self.error = threading.Event(), None
        self._blank = plan.spec.empty(plan.slices.chunk)
        # Whether images may be JPEGs for tensorflow, and whether it can read their files too.
        self._native = not (plan.spec.annotation or isinstance(plan.source, ArraySource))
        self._paths = plan.source.paths(plan.split) if self._native else None
        self._labels = None if self._paths is None else plan.source.labels(plan.split)
        # (epochs, indices, examples as `plan.fetch` gives them) of the chunks on their way that Python has read, by number.
        self._read = {}

    # --- Batches, by Python ------------------------------------------------------------------------------------------

    def signature(self):
        """Return the structure of what `batches` yields."""
        shape, views = (self.plan.slices.per_batch, self.plan.slices.chunk), len(self.plan.spec.images)
        signature = {"number": tf.TensorSpec(shape[:1], tf.int64)}
        if self._native:
            signature |= {key: tf.TensorSpec(shape, tf.int32) for key in ("index", "label", "quarter")}
            signature |= {"data": tf.TensorSpec(shape, tf.string), "mirrored": tf.TensorSpec((*shape, views), tf.bool)}
            signature |= {"draws": tf.TensorSpec((*shape, views, 22), tf.float64)}
        return signature

    def batches(self):
        """Yield what `make` needs to know of each batch, as arrays [chunks, examples of each, ...]."""
        try:
            reader = None if self.plan.source.random_access else self._stream()
            per_batch, first = self.plan.slices.per_batch, 0
            while not self.stop.is_set() and (self.plan.batches is None or first < self.plan.batches * per_batch):
                numbers = np.arange(first, first + per_batch)
                for number in numbers if reader else ():
                    self._read[number] = next(reader)
                yield {"number": numbers, **(self._about(numbers) if self._native else {})}
                first += per_batch
        except tf.errors.OpError as error:  # A file that is gone, or a record that fails its checksum.
            reason = " ".join((error.message or type(error).__name__).split())[:300]
            message = f"data.source='{self.plan.source.spec}' cannot be read: {reason}"
            self.error = UserError(message, exit_code=RUN_FAILED)
            self.error.__cause__ = error
        except Exception as error:
            self.error = self.error or error

    def _about(self, numbers):
        """Return {name: array} of the examples of some chunks: who they are, where their files are, what is drawn."""
        spec, shape = self.plan.spec, (len(numbers), self.plan.slices.chunk)
        epochs, indices = (np.concatenate(x) for x in zip(*(self._examples(number)[:2] for number in numbers)))
        rows = np.maximum(indices, 0)
        about = {"index": indices.astype(np.int32), "quarter": spec.quarters(epochs, rows)}
        if self._paths is not None:
            about["label"] = np.where(indices < 0, -1, self._labels[rows]).astype(np.int32)
            about["data"] = np.array([self._file(index) for index in indices.tolist()], object)
        else:
            read = [self._contents(number) for number in numbers if number in self._read]
            empty = (np.full(len(indices), b"", object), np.full(len(indices), -1, np.int32))
            about["data"], about["label"] = (np.concatenate(x) for x in zip(*read)) if read else empty
        views = range(len(spec.images))
        mirrored = [np.broadcast_to(spec.mirrored(epochs, rows, view), len(rows)) for view in views]
        draws = [spec.draws(epochs, rows, view) if spec.train else np.zeros((len(rows), 22)) for view in views]
        about |= {"mirrored": np.stack(mirrored, 1), "draws": np.stack(draws, 1)}
        return {key: array.reshape(*shape, *array.shape[1:]) for key, array in about.items()}

    def _file(self, index):
        """Return the path of an example's file as bytes; none where it cannot be a JPEG."""
        path = "" if index < 0 else self._paths[index]
        return b"" if os.path.splitext(path)[1].lower() in _OTHERS else os.fsencode(path)

    def _stream(self):
        """Yield (epochs, indices, examples) of each chunk of a source that is read in order."""
        plan, epoch, stream = self.plan, None, None
        for number in itertools.count():
            epochs, places = plan.order.places(plan.slices.positions(number))
            examples = [None] * len(places)
            for k in np.flatnonzero(places >= 0):
                if epoch != epochs[k]:
                    epoch = epochs[k]
                    stream = self._open(int(epoch), int(places[k]))
                examples[k] = next(stream, None)
                if examples[k] is None:
                    raise UserError(
                        f"data.source='{plan.source.spec}' split '{plan.split}' ended early in epoch {epoch}: it should have "
                        f"{plan.order.n} images; prepare the data set again"
                    )
            indices = np.array([-1 if example is None else example[3] for example in examples])
            yield epochs, indices, [example and example[:3] for example in examples]

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

    def forget(self, numbers):
        """Drop what was read for chunks that are done."""
        for number in numbers.tolist():
            self._read.pop(number, None)

    # --- Chunks, by tensorflow's operations --------------------------------------------------------------------------

    def make(self, chunk):
        """Return the examples of a chunk, a dict of tensors with those of `batches`: every key of a batch."""
        count, images = self.plan.slices.chunk, self.plan.spec.images
        if not self._native:
            return self._finish(chunk["number"], tf.zeros(count, bool), tf.zeros(count, tf.int32), [])
        if self._paths is None and self.plan.source.random_access:
            chunk["data"], chunk["label"] = self._fetch(chunk["number"])
        examples = tf.data.Dataset.from_tensor_slices((chunk["data"], chunk["draws"], chunk["mirrored"]))
        made = examples.map(self._crops).batch(count, drop_remainder=True)
        # Where an operation fails, Python makes the whole chunk.
        none = tf.data.Dataset.from_tensors((tf.zeros(count, bool), *(tf.constant(self._blank[key]) for key in images)))
        done, *crops = made.ignore_errors().concatenate(none).take(1).get_single_element()

        def native():
            same = {key: chunk[key] for key in ("number", "index", "label", "quarter")}
            return {**same, "mask": done, **dict(zip(images, crops))}

        def python():
            return self._finish(chunk["number"], done, chunk["label"], crops)

        return tf.cond(tf.reduce_all(done | (chunk["index"] < 0)), native, python)

    def _crops(self, data, draws, mirrored):
        if self._paths is not None:
            data = tf.cond(tf.equal(data, ""), lambda: "", lambda: tf.io.read_file(data))
        return jpeg.crops(data, self.plan.spec, draws, mirrored)

    # --- Chunks, by Python -------------------------------------------------------------------------------------------

    def _fetch(self, number):
        """Return the contents string [c] of a chunk's examples, empty where there are none, and their labels int32 [c]."""
        data, label = tf.numpy_function(self._fetched, [number], [tf.string, tf.int32], stateful=False)
        return tf.ensure_shape(data, [self.plan.slices.chunk]), tf.ensure_shape(label, [self.plan.slices.chunk])

    def _fetched(self, number):
        if not (self.stop.is_set() or self.error):
            with self._kept():
                epochs, indices, _ = self._examples(number)
                self._read[int(number)] = epochs, indices, [self._example(index) for index in indices.tolist()]
                return self._contents(int(number))
        return np.full(self.plan.slices.chunk, b"", object), np.full(self.plan.slices.chunk, -1, np.int32)

    def _example(self, index):
        """Return (data, label, name) of an example, or the error that makes a bad file of it; None for padding."""
        try:
            return None if index < 0 else self.plan.fetch(index)
        except (OSError, decode.BadImage) as error:
            return error

    def _contents(self, number):
        """Return (contents object [c], labels int32 [c]) of a chunk that was read."""
        examples = [example if isinstance(example, tuple) else (b"", -1) for example in self._read[number][2]]
        data = np.empty(len(examples), object)
        data[:] = [example[0] if isinstance(example[0], bytes) else b"" for example in examples]
        return data, np.array([example[1] for example in examples], np.int32)

    def _examples(self, number):
        """Return (epochs int64 [c], indices int64 [c], function of (k, index) that fetches) of a chunk's examples."""
        if int(number) not in self._read:
            return *self.plan.order(self.plan.slices.positions(number)), lambda _, index: self.plan.fetch(index)
        epochs, indices, examples = self._read[int(number)]

        def fetch(k, _):
            if isinstance(examples[k], Exception):
                raise examples[k]
            return examples[k]

        return epochs, indices, fetch

    def _finish(self, number, done, label, crops):
        """Return the examples of a chunk as tensors. Python makes those that are not done (bool [c])."""
        types = {key: array.dtype for key, array in self._blank.items()}
        arrays = tf.numpy_function(self._finished, [number, done, label, *crops], list(types.values()), stateful=False)
        shaped = [tf.ensure_shape(x, blank.shape) for x, blank in zip(arrays, self._blank.values())]
        return {"number": number, **dict(zip(types, shaped))}

    def _finished(self, number, done, label, *crops):
        if not (self.stop.is_set() or self.error):
            with self._kept():
                return list(self._made(number, done, label, crops).values())
        return list(self._blank.values())

    def _made(self, number, done, label, crops):
        spec, bad = self.plan.spec, self.plan.bad
        epochs, indices, fetch = self._examples(number)
        if not done.any():
            return image.build(spec, fetch, epochs, indices, bad, jpeg.window)
        rows = np.flatnonzero(~done)
        rest = image.build(spec, lambda k, i: fetch(rows[k], i), epochs[rows], indices[rows], bad, jpeg.window)
        whole = {"quarter": spec.quarters(epochs, np.maximum(indices, 0)), "label": label, "mask": done}
        whole |= {"index": indices.astype(np.int32), **dict(zip(spec.images, crops))}
        out = {key: np.array(whole[key]) for key in self._blank}
        for key, array in out.items():
            array[rows] = rest[key]
        return out

    @contextlib.contextmanager
    def _kept(self):
        """Keep an error of what is done within as `error`."""
        try:
            yield
        except BaseException as error:
            self.error = self.error or error
