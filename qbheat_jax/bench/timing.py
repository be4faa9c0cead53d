"""Alternating runs of several candidates in one process: whatever slows the machine down slows all of them."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable

# Calls in a run at the most, however short they are.
_MOST = 1000


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One thing to time. `run(calls) -> seconds` of so many calls in a row; `amount`: what a call does, such as images."""

    name: str
    run: Callable
    amount: float = 1.0


def repeated(call, clock=time.perf_counter):
    """The `run` of a function that returns once its work is done."""

    def run(calls):
        began = clock()
        for _ in range(calls):
            call()
        return clock() - began

    return run


def alternate(candidates, rounds, seconds=1.0):
    """-> {name: {"calls": calls a run, "seconds": [seconds a call, one a round]}}.

    Each is warmed up first: called once, which compiles it, and once more, which says how many calls take `seconds`.
    Every second round goes backwards, so that none always comes after the same other one, and every turn begins with one
    call that does not count: caches and the allocator's memory are then as the one before left them (a step of jax was seen
    to take twice as long right after one of PyTorch as after another of its own).
    """
    figures = {}
    for candidate in candidates:
        candidate.run(1)
        second = candidate.run(1)
        calls = min(_MOST, max(1, math.ceil(seconds / max(second, 1e-9)))) if seconds else 1
        figures[candidate.name] = {"calls": calls, "seconds": []}
    for number in range(rounds):
        for candidate in candidates if number % 2 == 0 else reversed(candidates):
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


def fastest(figures, names):
    """Of `names`, the one whose median is least."""
    return min(names, key=lambda name: statistics.median(figures[name]["seconds"]))
