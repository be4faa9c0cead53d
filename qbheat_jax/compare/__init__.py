"""Compare methods: pre-train each with each seed, probe each encoder, and tabulate the results."""

from qbheat_jax.compare.plan import read
from qbheat_jax.compare.run import run
from qbheat_jax.compare.table import text

__all__ = ["read", "run", "text"]
