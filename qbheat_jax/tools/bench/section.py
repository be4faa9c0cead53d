"""Make the sections of a benchmark's result: JSON-ready dicts of candidates that were timed together."""

import sys

from qbheat_jax.tools.bench import timing


def make(part, title, unit, candidates, figures, ratios, limit, notes=()):
    """Return a section with a row for each timed candidate.

    Args:
      part: Part of the benchmark, such as "forward".
      title: Title of the table.
      unit: Unit of the rates, such as "images/s"; "" for times only.
      candidates: List of `timing.Candidate`.
      figures: Dict of `timing.alternate`.
      ratios: [(words, spread), ...].
      limit: The section's `timing.Limit`.
      notes: List of notes for the table.
    """
    rows = [
        {
            "name": c.name,
            "calls": figures[c.name]["calls"],
            "seconds": figures[c.name]["seconds"],
            "milliseconds": timing.spread([1000 * s for s in figures[c.name]["seconds"]]),
            "rate": timing.rates(figures[c.name]["seconds"], c.amount) if unit else None,
        }
        for c in candidates
        if c.name in figures
    ]
    ratios = [{"name": words, **figure} for words, figure in ratios]
    return {
        "part": part, "title": title, "unit": unit, "rows": rows, "ratios": ratios, "notes": [*notes, *limit.notes],
        "limit_reached": limit.stopped, "peak_bytes": peak_memory(),
    }  # fmt: skip


def peak_memory():
    """Return the peak memory of this process in bytes, or None if the system does not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
