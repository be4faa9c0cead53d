"""The `tfds:NAME[/CONFIG]` source: data sets that TensorFlow Datasets has prepared on disk; nothing is downloaded.

ArrayRecord files are read by index. TFRecord files are read as a stream, in an order that is a pure function of (seed,
epoch): files are shuffled and interleaved, then a seeded buffer of encoded examples is shuffled. Every process
reads the whole stream and keeps its own part, so ArrayRecord suits many hosts better.
"""

import errno

import numpy as np
from etils import epath

from qbheat_jax.data import augment
from qbheat_jax.data.cpu_tensorflow import tf, untuned
from qbheat_jax.data.order import permute
from qbheat_jax.data.sources import base
from qbheat_jax.errors import UserError

# Encoded examples in the shuffle buffer; about 0.5 GB for ImageNet.
SHUFFLE_BUFFER = 4096
_INTERLEAVED_FILES = 16
_READERS = 4  # threads that read the interleaved files
# Splits to look for if the data set's info lists none (mocked data).
_USUAL_SPLITS = ("train", "validation", "test")


class Tfds(base.Source):
    """A prepared data set with one image and at most one label.

    `random_access` tells whether `fetch` works; otherwise `stream` does.

    Args:
      spec: tfds:NAME[/CONFIG].
      builder: the result of `builder_of`.
    """

    def __init__(self, spec, builder):
        self._builder, info = builder, builder.info
        self._image, self._label = _features(spec, info.features)
        self.random_access = _has_random_access(info)
        # Open every split once, not for each epoch, because tfds then accesses the file system.
        self._opened, splits = {}, {}
        for name in tuple(info.splits) or _USUAL_SPLITS:
            split = "val" if name == "validation" else name
            try:
                self._opened[split], splits[split] = self._open(name)
            except (AssertionError, OSError, tf.errors.OpError) as error:
                raise UserError(
                    f"data.source='{spec}' is not prepared in {self._builder.data_dir}: run 'tfds build {spec[5:]} "
                    "--file_format=array_record', or set data.tfds_dir to the folder that holds it"
                ) from error
        super().__init__(spec, splits, list(info.features[self._label].names) if self._label else None)

    def _open(self, name):
        """Return (the reader of a split, its number of examples)."""
        import tensorflow_datasets as tfds

        decoders = {self._image: tfds.decode.SkipDecoding()}
        if self.random_access:
            examples = self._builder.as_data_source(split=name, decoders=decoders)
            return examples, len(examples)
        info = self._builder.info
        if name in info.splits and epath.Path(info.splits[name].filepaths[0]).exists():
            if info.file_format != tfds.core.file_adapters.FileFormat.TFRECORD:
                raise UserError(
                    f"data.source='tfds:{info.full_name}' is stored as {info.file_format.value}: prepare it with "
                    "--file_format=array_record or tfrecord"
                )
            split = info.splits[name]
            files = _Files([str(path) for path in split.filepaths], split.shard_lengths, self._parser(decoders))
            return files, sum(split.shard_lengths)
        # There are no files: mocked data, which tfds only makes as a whole split.
        dataset = self._builder.as_dataset(split=name, shuffle_files=False, decoders=decoders)
        return _Whole(dataset.map(self._relevant)), int(dataset.cardinality())

    def _parser(self, decoders):
        import tensorflow_datasets as tfds

        # Other features, such as masks, are not parsed.
        wanted = {key: True for key in (self._image, self._label) if key}
        features = tfds.decode.PartialDecoding(wanted, decoders).extract_features(self._builder.info.features)
        return lambda record: features.deserialize_example(record, decoders=decoders)

    def _relevant(self, example):
        return {key: example[key] for key in (self._image, self._label) if key}

    def identity(self, split):
        return f"{super().identity(split)} {self._builder.info.full_name}"

    def fetch(self, split, index):
        """Return (encoded bytes or uint8 [H, W, C], label, name). Raise OSError with the name if the record is unreadable."""
        split = self.split(split)
        return (*self._content(self._example(split, index)), self._name(split, index))

    def _example(self, split, index):
        """Return all features of an example; raise OSError if its record cannot be read."""
        try:
            return self._opened[split][index]
        except RuntimeError as error:  # ArrayRecord's error for a damaged file
            raise OSError(errno.EIO, " ".join(str(error).split())[:200], self._name(split, index)) from error

    def _name(self, split, index):
        return f"{self.spec} {split}[{index}]"

    def stream(self, split, *, seed, epoch, shuffle, first, keep):
        """Yield (encoded bytes or uint8 [H, W, C], label, name, example index) of one epoch.

        Args:
          split: name of the split.
          seed, epoch: ints that determine the order.
          shuffle: whether to shuffle.
          first: position within the epoch to start at.
          keep: (shift, period, rows): yield only positions i with (i + shift) % period in rows, this process's rows of each
            batch.
        """
        split = self.split(split)
        shift, period, rows = keep
        mine = tf.constant(np.isin(np.arange(period), rows))

        opened = self._opened[split]
        records = opened.records(seed, epoch, shuffle)
        if shuffle:
            draw = int(augment.bits(seed, epoch, 0, "files") >> 33)
            records = records.shuffle(SHUFFLE_BUFFER, seed=draw, reshuffle_each_iteration=False)
        records = records.skip(first).enumerate(first)
        if len(rows) < period:
            records = records.filter(lambda place, _: tf.gather(mine, (place + shift) % period))
        # Parse last, so that a process parses only its own examples.
        examples = records.map(lambda _, record: (record[0], opened.parse(record[1])), num_parallel_calls=2)
        for index, example in untuned(examples.prefetch(16)).as_numpy_iterator():
            yield (*self._content(example), self._name(split, index), int(index))

    def _content(self, example):
        """Return (encoded bytes, or pixels if tfds decoded them anyway; int label, -1 for none)."""
        image = example[self._image]
        label = int(example[self._label]) if self._label else -1
        return image if isinstance(image, bytes) else np.asarray(image), label


class _Files:
    """The TFRecord files of a split: `paths`, the number of examples in each, and the parser of an example."""

    def __init__(self, paths, lengths, parse):
        self.paths, self.parse = np.array(paths), parse
        self.offsets = np.cumsum([0, *lengths[:-1]], dtype=np.int64)

    def records(self, seed, epoch, shuffle):
        """Return a tf.data.Dataset of (example index int64, encoded record): in order, or shuffled and interleaved by file."""
        order = np.arange(len(self.paths))
        if shuffle:
            order = permute(order, len(order), seed, epoch)
        files = tf.data.Dataset.from_tensor_slices((self.paths[order], self.offsets[order]))

        def numbered(path, offset):
            return tf.data.TFRecordDataset(path).enumerate(offset)

        if not shuffle:
            return files.flat_map(numbered)
        return files.interleave(
            numbered,
            cycle_length=_INTERLEAVED_FILES,
            block_length=16,
            num_parallel_calls=_READERS,
            deterministic=True,
        )


class _Whole:
    """A split that is one tf.data.Dataset of parsed examples."""

    def __init__(self, dataset):
        self.dataset = dataset

    def records(self, seed, epoch, shuffle):
        return self.dataset.enumerate()

    @staticmethod
    def parse(example):
        return example


def builder_of(spec, data_dir):
    """Return the tfds builder of a spec.

    Args:
      spec: tfds:NAME[/CONFIG].
      data_dir: folder of the prepared data sets; "" for tfds's default.

    Raises:
      UserError: there is no such data set, or its builder fails.
    """
    import tensorflow_datasets as tfds

    name = spec.partition(":")[2]
    if not name:
        raise UserError(f"data.source='{spec}' is not accepted: it takes tfds:NAME or tfds:NAME/CONFIG")
    try:
        return tfds.builder(name, **({"data_dir": data_dir} if data_dir else {}))
    except tfds.core.registered.DatasetNotFoundError as error:
        raise UserError(
            f"data.source='{spec}': TensorFlow Datasets has no data set '{name}', and none is prepared in "
            f"{data_dir or 'its default folder'}: check the name, or set data.tfds_dir to the folder that holds it"
        ) from error
    except Exception as error:  # builders are third-party code, and raise their own exceptions for a wrong config
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"data.source='{spec}' cannot be opened: {reason[0]}") from error


def _features(spec, features):
    """Return (name of the image feature, name of the label feature or None)."""
    import tensorflow_datasets as tfds

    def first(kind, usual):
        names = [name for name in features if isinstance(features[name], kind)]
        return usual if usual in names else min(names, default=None)

    image = first(tfds.features.Image, "image")
    if image is None:
        raise UserError(f"data.source='{spec}' has no image feature: its features are {', '.join(sorted(features))}")
    return image, first(tfds.features.ClassLabel, "label")


def _has_random_access(info):
    import tensorflow_datasets as tfds

    return bool(info.available_file_formats() & tfds.core.file_adapters.FileFormat.with_random_access())
