"""Alternating runs of several candidates in one process: whatever slows the machine down slows all of them."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable

import jax

# Calls in a run at the most, however short they are.
_MOST = 1000


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One thing to time. `run(calls) -> seconds` of so many calls in a row; `amount`: what a call does, such as images."""

    name: str
    run: Callable
    amount: float = 1.0


class NotTimed(Exception):
    """Raised by the first run of a candidate that does not work here. Its text goes into the section's notes."""


class Limit:
    """The seconds that a section may take, from now on; 0: no limit.

    `stopped`: whether it cut the section short. `notes`: what was not timed, and why.
    """

    def __init__(self, seconds=0.0, clock=time.perf_counter):
        self.stopped, self.notes = False, []
        self._seconds, self._clock, self._began = seconds, clock, clock()

    def reached(self):
        """Return whether the section has taken that long."""
        return bool(self._seconds) and self._clock() - self._began >= self._seconds

    def stop(self, words):
        """Note what is left out because the limit is reached."""
        self.stopped = True
        self.notes.append(f"{words}: the limit of {self._seconds:g} s was reached")


def repeated(call, wait=lambda result: None, ahead=False, clock=time.perf_counter):
    """Return the `run` of a function.

    Args:
      call: Does its work, or only sends it to a device and returns the result.
      wait: Function of that result that returns once the work is done.
      ahead: Send all calls of a run, then wait for the last one, since a device runs them in order. Otherwise wait for each
        call. No result is kept while the next call runs.
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
    """Return whether calls are sent before the last one is done, as the training loop sends steps.

    PyTorch on a CPU returns when the work is done, so jax waits for each call there too.
    """
    return jax.default_backend() != "cpu"


def on_device(call, wait=jax.block_until_ready):
    """Return the `run` of a function that sends work to the device jax computes on; `wait` as in `repeated`."""
    return repeated(call, wait, sends_ahead())


def lazy(make):
    """Return the `run` that `make()` returns, made when it is first used: setup and compilation are part of that run."""
    made = []

    def run(calls):
        if not made:
            made.append(make())
        return made[0](calls)

    return run


def alternate(candidates, rounds, seconds=1.0, limit=None):
    """Time the candidates in turn.

    Each is warmed up first: called once, which compiles it, and once more, which says how many calls take `seconds`.
    Every second round goes backwards, so that none always comes after the same other one, and every turn begins with one
    call that does not count: caches and the allocator's memory are then as the one before left them (a step of jax was seen
    to take twice as long right after one of PyTorch as after another of its own).

    The limit is checked before each candidate's first call and between rounds. Candidates that come too late are left
    out. The others are timed for one round at least, so that what was compiled gives a figure.

    Returns:
      {name: {"calls": calls a run, "seconds": [seconds a call, one a round]}} of the candidates that were timed; why the
      others were not is in `limit.notes`.
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
        calls = min(_MOST, max(1, math.ceil(seconds / max(second, 1e-9)))) if seconds else 1
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
    """
    >>> spread([3.0, 1.0, 2.0])
    {'median': 2.0, 'min': 1.0, 'max': 3.0}
    """
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def rates(seconds, amount):
    """Spread of what is done a second, where a call does `amount` in each of `seconds`."""
    return spread([amount / s for s in seconds])


def ratio(seconds, other):
    """Spread of seconds / other, round by round: the two of a round ran next to each other.

    >>> ratio([1.0, 2.0, 3.0], [2.0, 2.0, 2.0])
    {'median': 1.0, 'min': 0.5, 'max': 1.5}
    """
    return spread([s / t for s, t in zip(seconds, other, strict=True)])


def ratios(seconds, pairs):
    """Return [(words, ratio), ...] of [(words, name, other name), ...]; those of candidates that were not timed are left out.

    >>> ratios({"a": [1.0], "b": [2.0]}, [("b over a", "b", "a"), ("c over a", "c", "a")])
    [('b over a', {'median': 2.0, 'min': 2.0, 'max': 2.0})]
    """
    return [(words, ratio(seconds[a], seconds[b])) for words, a, b in pairs if a in seconds and b in seconds]


def fastest(figures, names):
    """Of `names`, the one whose median is least."""
    return min(names, key=lambda name: statistics.median(figures[name]["seconds"]))
