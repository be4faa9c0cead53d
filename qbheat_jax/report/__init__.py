"""One self-contained HTML page about a run: pictures, curves, probes, what A and B learnt, how to repeat it."""

from qbheat_jax.report.page import write
from qbheat_jax.report.sample import Sample

__all__ = ["Sample", "write"]
