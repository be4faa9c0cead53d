"""A profiler trace of a few steps of a run, and the table of its longest kernels."""

import collections
import contextlib
import json
import logging
import pathlib
import re
import shutil
import tempfile
import time

import jax
from etils import epath

from qbheat_jax import paths
from qbheat_jax.errors import UserError

log = logging.getLogger("qbheat")

FOLDER = "profile"
# Characters of a kernel's name in the log; kernels.json has it whole.
_SHOWN = 90
# XLA ops of a CPU that only run others, which are counted by themselves.
_CONTAINERS = re.compile(r"(while|call|conditional)(\.|$)")


def parse(text):
    """Return (first, last) of a "FIRST,LAST" from the command line. Raise UserError for anything else.

    >>> parse("10,13")
    (10, 13)
    """
    match = re.fullmatch(r"(\d+),(\d+)", text.replace(" ", ""))
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first < last:
        raise UserError(
            f"--profile_steps {text}: it takes two whole numbers FIRST,LAST with 1 <= FIRST < LAST, such as 10,13"
        )
    return first, last


class Trace:
    """Trace the steps between two steps of a run: from when `first` is done to when `last` is.

    The numbers are those of `metrics.jsonl`, so (10, 13) traces steps 11, 12 and 13. Call `begin` before each step and `end`
    after it. The trace goes to WORKDIR/profile, the table to the log and WORKDIR/profile/kernels.json. Process 0 alone traces.

    Args:
      workdir: The run's directory; may be a bucket.
      between: (first, last), or None to trace nothing.
      begin: The step at which this process starts. Its first step compiles, so the trace starts after that at the earliest.
      steps: The run's length.
    """

    def __init__(self, workdir, between, begin, steps):
        self._folder, self._between = epath.Path(workdir) / FOLDER, None
        self._local = self._started = None
        if between is None or jax.process_index():
            return
        first, last = between
        if max(first, begin) >= steps:
            log.warning("--profile_steps %d,%d traces nothing: the run ends at step %d", first, last, steps)
        elif first <= begin:
            log.warning(
                "--profile_steps %d,%d traces nothing: this process starts at step %d and compiles first, so FIRST is at "
                "least %d", first, last, begin, begin + 1,
            )  # fmt: skip
        else:
            if last > steps:
                log.warning("--profile_steps %d,%d: the run ends at step %d, and so does the trace", first, last, steps)
            self._between = first, min(last, steps)

    def begin(self, step, state):
        """Start the trace if it starts here. `step`: steps done. `state`: what the device is waited for by."""
        if self._between and step == self._between[0]:
            jax.block_until_ready(state)
            # The profiler writes to disks alone.
            self._local = tempfile.mkdtemp() if paths.remote(self._folder) else str(self._folder)
            start(self._local)
            self._started = time.perf_counter()

    def end(self, step, state):
        """Stop the trace if it stops here, and tell what it holds."""
        if self._started is None or step != self._between[1]:
            return
        jax.block_until_ready(state)
        seconds, self._started = time.perf_counter() - self._started, None
        jax.profiler.stop_trace()
        first, last = self._between
        table = {"first": first, "last": last, "step_ms": 1000 * seconds / (last - first)}
        table |= longest(self._local, last - first)
        (pathlib.Path(self._local) / "kernels.json").write_text(json.dumps(table, indent=2) + "\n")
        self._to_bucket()
        log.info("profile of steps %d to %d, in %s\n%s", first + 1, last, self._folder, text(table))

    def close(self):
        """Stop a trace that the end of the run cut short. What it holds is written, without a table."""
        if self._started is not None:
            self._started = None
            jax.profiler.stop_trace()
            self._to_bucket()
            log.warning("the trace in %s is cut short, so its kernels are not counted", self._folder)

    def _to_bucket(self):
        if self._local == str(self._folder):
            return
        for file in (p for p in pathlib.Path(self._local).rglob("*") if p.is_file()):
            target = self._folder / file.relative_to(self._local).as_posix()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
        shutil.rmtree(self._local)


def start(folder):
    """Start a trace into FOLDER/plugins/profile, where TensorBoard looks for it. `jax.profiler.stop_trace` stops it."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # a step's Python calls would outnumber its kernels
    jax.profiler.start_trace(folder, create_perfetto_trace=True, profiler_options=options)


@contextlib.contextmanager
def trace(folder):
    """Trace what runs inside, which waits for the device itself."""
    start(folder)
    try:
        yield
    finally:
        jax.profiler.stop_trace()


def longest(folder, steps=1, count=None):
    """Sum the device's kernels in the newest trace below a folder.

    Args:
      folder: What `start` was given.
      steps: Steps that the trace holds; figures are for one of them.
      count: Rows returned; None: all.

    Returns:
      {"devices", "kernel_ms", "launches", "kernels": [{"ms", "times", "name"}, ...]}: milliseconds and launches a step and
      device, the longest name first. Copies and memsets count as launches. Kernels on several streams overlap, so that
      `kernel_ms` may exceed the time of a step. Without device planes ("devices" is 0) they are XLA's operations on the CPU,
      summed over its threads.
    """
    planes = [p for file in _newest(folder) for p in jax.profiler.ProfileData.from_file(str(file)).planes]
    devices = [p for p in planes if re.fullmatch(r"/device:\w+:\d+", p.name)]
    events = [e for plane in devices for e in _kernels(plane)] if devices else list(_host_operations(planes))
    times, nanoseconds = collections.Counter(), collections.Counter()
    for name, duration in events:
        times[name] += 1
        nanoseconds[name] += duration
    share = steps * max(1, len(devices))
    rows = [
        {"ms": ns / share / 1e6, "times": times[name] / share, "name": name} for name, ns in nanoseconds.most_common()
    ]
    return {
        "devices": len(devices),
        "kernel_ms": nanoseconds.total() / share / 1e6,
        "launches": len(events) / share,
        "kernels": rows[:count],
    }


def _newest(folder):
    """Return the .xplane.pb files of the newest trace below a folder."""
    traces = sorted((pathlib.Path(folder) / "plugins" / "profile").iterdir(), key=lambda path: path.stat().st_mtime)
    return sorted(traces[-1].glob("*.xplane.pb"))


def _kernels(plane):
    """Yield (name, nanoseconds) of what ran on a device.

    A GPU has a line a stream, a TPU one of XLA ops. Lines beside them sum up the same time by module, step or scope.
    """
    lines = list(plane.lines)
    streams = [line for line in lines if line.name.startswith("Stream")]
    chosen = streams or [line for line in lines if line.name == "XLA Ops"] or lines
    return ((event.name, event.duration_ns) for line in chosen for event in line.events)


def _host_operations(planes):
    for plane in planes:
        for line in plane.lines if plane.name == "/host:CPU" else ():
            for event in line.events:
                if any(name == "hlo_op" for name, _ in event.stats) and not _CONTAINERS.match(event.name):
                    yield event.name, event.duration_ns


def text(table, count=20):
    """Return a table of `longest` as lines for the log."""
    where = "kernels" if table["devices"] else "CPU operations (no device is in the trace)"
    step = f"{table['step_ms']:.2f} ms a step, traced; " if "step_ms" in table else ""
    lines = [f"{step}{table['kernel_ms']:.2f} ms of {where} in {table['launches']:,.0f} launches a step"]
    lines += [f"{'ms':>9} {'times':>7}  name"]
    for row in table["kernels"][:count]:
        lines.append(f"{row['ms']:9.3f} {row['times']:7.4g}  {row['name'][:_SHOWN]}")
    return "\n".join(lines)
