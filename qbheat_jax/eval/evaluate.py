"""Measure a metric over a labelled split: the one evaluation loop, on any mesh and with any number of processes."""

import collections
import contextlib
import dataclasses
import time

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from qbheat_jax import data, device_mesh, methods
from qbheat_jax.data import device_cache
from qbheat_jax.errors import UserError
from qbheat_jax.train import sharding


class Metric:
    """Base class of metrics. A subclass declares all of the following.

    Attributes:
      name: Its name in errors.
      headline: The figure to quote where one number has to do.
      quoted: The figures of a result's line.
      inputs: Names of the arrays of a batch that `sums` reads, "mask" among them.
    """

    name = headline = ""
    quoted: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ("image", "label", "mask")

    def sums(self, variables, batch):
        """Reduce a batch on the devices; jitted.

        Args:
          variables: {"params": ..., "batch_stats": ...}.
          batch: Dict of global arrays [B, ...], the `inputs`. Rows whose mask is False must not count.

        Returns:
          Dict of arrays. "n", int32, is the number of examples counted.
        """
        raise NotImplementedError

    def add(self, total, sums):
        """Return `total`, or None before the first batch, with one more result of `sums` (numpy arrays) added."""
        return sums if total is None else {name: total[name] + value for name, value in sums.items()}

    def figures(self, total):
        """Return the results of all batches' total.

        Returns:
          ({name: number, or None where it is undefined}, dict of further details). The metric that a method names has the
          detail "per_class", {class name: number}. Each other detail becomes a file of the workdir.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Measured:
    """The result of one evaluation.

    Attributes:
      figures: {name: float, or None where it is undefined}.
      details: What else the metric found.
      n: Examples counted.
      skipped: Files that this process could not read.
      images_per_second: Without the first batch, which is compiled for, where there are others.
    """

    figures: dict
    details: dict
    n: int
    skipped: int
    images_per_second: float


def step(metric, mesh):
    """Return the jitted `metric.sums`. Every process gets its results whole; variables stay sharded as they are."""

    def sums(variables, batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # attention is laid out as in training
            return metric.sums(variables, batch)

    return jax.jit(sums, out_shardings=NamedSharding(mesh, PartitionSpec()))


class Evaluator:
    """Measure a metric over a split, each example once, as `data.eval_batches` shows it.

    Batches are split over `data` and `fsdp` of the mesh. Their size is rounded up to a multiple of the devices; padding
    is masked. The program is compiled at the first call and serves all others.

    Attributes:
      measured: The `Measured` of the last call, None before.
    """

    def __init__(
        self,
        metric,
        source,
        split,
        mesh,
        spec,
        *,
        batch_size,
        cache=None,
        max_bad_fraction=1.0,
        workers=0,
        prefetch=2,
        keep=False,
    ):
        """Prepare an evaluation; nothing is read or compiled yet.

        Args:
          metric: A `Metric`.
          source: Of `data.open_source`.
          split: Its split's name.
          mesh: The mesh to evaluate on.
          spec: The data spec of its batches, not augmented.
          batch_size: Examples at a time, over all devices.
          cache: A `DeviceCache` of the split on the mesh, or None.
          max_bad_fraction: The share of the split that may be unreadable.
          workers, prefetch: As of `data.eval_batches`.
          keep: Keep the images in memory, so that they are read once for all calls; for a small split.
        """
        self._metric, self._source, self._split, self._mesh, self._cache = metric, source, split, mesh, cache
        self._spec = spec
        devices = mesh.shape["data"] * mesh.shape["fsdp"]
        self._batch_size = -(-batch_size // devices) * devices
        self._pipeline = {"workers": workers, "prefetch": prefetch}
        self._max_bad_fraction = max_bad_fraction
        self._step = step(metric, mesh)
        self._keep, self._kept = keep and cache is None, []
        self.measured = None

    @classmethod
    def of_run(cls, metric, source, split, config, **fields):
        """Return the evaluator of a training run. `fields` override its config."""
        mesh, settings = device_mesh.make_mesh(config.mesh), config.data
        given = {
            "batch_size": config.batch_size,
            "max_bad_fraction": settings.max_bad_fraction,
            "workers": settings.workers,
            "prefetch": settings.prefetch,
        }
        spec = methods.batch_spec(config).evaluation()
        if settings.get("device_cache") and spec.cacheable:
            given["cache"] = device_cache.of(settings, config.image_size, source, split, mesh)
        return cls(metric, source, split, mesh, spec, **{**given, **fields})

    def __call__(self, variables):
        """Evaluate, in all processes alike.

        Args:
          variables: {"params": ..., "batch_stats": ...}: arrays on the mesh, or anything that numpy reads, the same in
            every process.

        Returns:
          {"SPLIT/NAME": float} of the figures that are defined.

        Raises:
          UserError: No image can be read, too many cannot, or one has no label where the metric needs it.
        """
        bad = data.BadFiles(self._max_bad_fraction, self._source.splits[self._split])
        total, n, first, started = None, 0, None, time.perf_counter()
        with contextlib.closing(self._sums(place(variables, self._mesh), bad)) as parts:
            for sums in parts:
                total = self._metric.add(total, sums)
                n += int(sums["n"])
                first = first or (time.perf_counter(), n)
        if not n:
            raise UserError(
                f"data.source={self._source.spec!r} split {self._split!r} has no image that can be read, so "
                f"{self._metric.name} cannot be measured (see the log)"
            )
        begin, before = first if n > first[1] else (started, 0)
        rate = (n - before) / max(time.perf_counter() - begin, 1e-9)
        figures, details = self._metric.figures(total)
        self.measured = Measured(figures, details, n, bad.count, rate)
        return {f"{self._split}/{name}": value for name, value in figures.items() if value is not None}

    def _sums(self, variables, bad):
        """Yield each batch's sums as numpy arrays, while the devices work on the next batch."""
        sent, kept = collections.deque(), []
        with contextlib.closing(self._batches(bad)) as batches:
            for batch in batches:
                if self._keep:
                    kept.append(batch)
                if self._cache is None:
                    batch = device_mesh.put_batch(batch, self._mesh, self._batch_size)
                sent.append(self._step(variables, batch))
                if len(sent) > 1:
                    yield jax.device_get(sent.popleft())
            yield from map(jax.device_get, sent)
        self._kept = kept

    def _batches(self, bad):
        """Yield this process's batches, with what the metric reads of them."""
        if self._kept:
            yield from self._kept
            return
        batches = data.eval_batches(
            self._source,
            self._spec,
            split=self._split,
            batch_size=self._batch_size,
            rows=device_mesh.rows(self._mesh, self._batch_size),
            bad=bad,
            cache=self._cache,
            **self._pipeline,
        )
        try:
            for batch in batches:
                yield {name: batch[name] for name in self._metric.inputs}
        finally:
            batches.close()


def place(variables, mesh):
    """Return variables as arrays on the mesh, split by the rules of training. Those already on it stay as they are."""
    devices = set(mesh.devices.flat)

    def one(leaf, where):
        if isinstance(leaf, jax.Array) and leaf.sharding.device_set == devices:
            return leaf
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, where, lambda index: array[index])

    return jax.tree.map(one, variables, sharding.shardings(variables, mesh))
