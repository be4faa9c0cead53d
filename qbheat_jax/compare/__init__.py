"""Methods side by side: each is pre-trained for each seed, each encoder is probed, and one table says how they did."""

from qbheat_jax.compare.plan import read
from qbheat_jax.compare.run import run
from qbheat_jax.compare.table import text

__all__ = ["read", "run", "text"]
