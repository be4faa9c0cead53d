"""A section of a result: candidates that were timed together, and how they compare. Plain data, as it goes into JSON."""

import sys

from qbheat_jax.tools.bench import timing


def make(part, title, unit, candidates, figures, ratios, limit, notes=()):
    """Return a section with a row for each candidate in `figures`.

    `unit`: of the rates, "" where only times are told. `ratios`: [(words, spread), ...]. `limit`: timing.Limit.
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
    """The most memory that this process has had at once, in bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
