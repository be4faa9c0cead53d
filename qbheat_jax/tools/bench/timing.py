"""Time several candidates in alternating runs of one process, so that disturbances of the machine affect all of them."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable

import jax

# Limit on the calls of a run, however short they are.
_MAX_CALLS = 1000


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A function to time.

    Attributes:
      name: Name in the table.
      run: Function (number of calls) -> seconds for that many calls in a row.
      amount: Work of a call, such as its number of images.
    """

    name: str
    run: Callable
    amount: float = 1.0


class NotTimed(Exception):
    """Raised by the first run of a candidate that does not work on this machine. Its text goes into the notes."""


class Limit:
    """Time limit of a section, from its creation.

    Args:
      seconds: The limit; 0 for none.
      clock: Function that returns seconds.

    Attributes:
      stopped: Whether the limit cut the section short.
      notes: List of notes on what was not timed, and why.
    """

    def __init__(self, seconds=0.0, clock=time.perf_counter):
        self.stopped, self.notes = False, []
        self._seconds, self._clock, self._began = seconds, clock, clock()

    def reached(self):
        """Return whether the limit is reached."""
        return bool(self._seconds) and self._clock() - self._began >= self._seconds

    def stop(self, words):
        """Add a note on what is left out because the limit is reached."""
        self.stopped = True
        self.notes.append(f"{words}: the limit of {self._seconds:g} s was reached")


def repeated(call, wait=lambda result: None, ahead=False, clock=time.perf_counter):
    """Return the `run` function of a call. It keeps no result while the next call runs.

    Args:
      call: Function that does its work, or only sends it to a device, and returns the result.
      wait: Function of that result that returns once the work is done.
      ahead: Send all calls of a run and wait for the last one, since a device runs them in order. Otherwise wait for each
        call.
      clock: Function that returns seconds.
    """

    def run(calls):
        sent = calls - 1 if ahead else 0
        began = clock()
        for _ in range(sent):
            call()
        for _ in range(calls - sent):
            wait(call())
        return clock() - began

    return run


def sends_ahead():
    """Return whether calls are sent ahead, as the training loop sends steps.

    On a CPU they are not: PyTorch returns there when the work is done, so jax also waits for each call.
    """
    return jax.default_backend() != "cpu"


def on_device(call, wait=jax.block_until_ready):
    """Return the `run` function of a call on jax's device; see `repeated`."""
    return repeated(call, wait, sends_ahead())


def lazy(make):
    """Return a `run` function that calls `make()` in its first run, which then includes setup and compilation."""
    made = []

    def run(calls):
        if not made:
            made.append(make())
        return made[0](calls)

    return run


def alternate(candidates, rounds, seconds=1.0, limit=None):
    """Time the candidates in turn.

    Two warm-up calls come first: one compiles, the other determines how many calls take `seconds`. Every second round
    runs in reverse, so that no candidate always follows the same one. The first call of a turn does not count, because
    it finds caches and memory as the last candidate left them: a jax step can take twice as long right after PyTorch.

    The limit is checked before each candidate's first call and between rounds. Candidates after it are left out; the
    others run for at least one round, so that every compiled program gives a figure.

    Args:
      candidates: List of `Candidate`.
      rounds: Number of timed runs of each candidate.
      seconds: Approximate length of a run; 0 for one call per run.
      limit: A `Limit`, or None.

    Returns:
      {name: {"calls": calls per run, "seconds": [seconds per call in each round]}} of the timed candidates. `limit.notes`
      explains why others are missing.
    """
    limit = limit or Limit()
    figures, timed = {}, []
    for candidate in candidates:
        if limit.reached():
            limit.stop(f"{candidate.name} is not timed")
            continue
        try:
            candidate.run(1)
        except NotTimed as reason:
            limit.notes.append(str(reason))
            continue
        second = candidate.run(1)
        calls = min(_MAX_CALLS, max(1, math.ceil(seconds / max(second, 1e-9)))) if seconds else 1
        figures[candidate.name] = {"calls": calls, "seconds": []}
        timed.append(candidate)
    for number in range(rounds if timed else 0):
        if number and limit.reached():
            limit.stop(f"timing stopped after {number} of {rounds} rounds")
            break
        for candidate in timed if number % 2 == 0 else reversed(timed):
            row = figures[candidate.name]
            candidate.run(1)
            row["seconds"].append(candidate.run(row["calls"]) / row["calls"])
    return figures


def spread(values):
    """Return the median, minimum and maximum of a list of numbers.

    >>> spread([3.0, 1.0, 2.0])
    {'median': 2.0, 'min': 1.0, 'max': 3.0}
    """
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def rates(seconds, amount):
    """Return the `spread` of `amount` per second, for a list of seconds per call."""
    return spread([amount / s for s in seconds])


def ratio(seconds, other):
    """Return the `spread` of seconds / other, round by round, since the runs of a round are close in time.

    >>> ratio([1.0, 2.0, 3.0], [2.0, 2.0, 2.0])
    {'median': 1.0, 'min': 0.5, 'max': 1.5}
    """
    return spread([s / t for s, t in zip(seconds, other, strict=True)])


def ratios(seconds, pairs):
    """Return [(words, ratio), ...] for pairs [(words, name, other name), ...], without candidates that were not timed.

    >>> ratios({"a": [1.0], "b": [2.0]}, [("b over a", "b", "a"), ("c over a", "c", "a")])
    [('b over a', {'median': 2.0, 'min': 2.0, 'max': 2.0})]
    """
    return [(words, ratio(seconds[a], seconds[b])) for words, a, b in pairs if a in seconds and b in seconds]


def fastest(figures, names):
    """Return the name in `names` with the smallest median time."""
    return min(names, key=lambda name: statistics.median(figures[name]["seconds"]))
