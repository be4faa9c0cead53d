"""QB-Heat in JAX: self-supervised vision from the heat equation (arXiv 2211.13228)."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qbheat_jax.api import Model

__version__ = "0.1.0"


def load(directory: str | os.PathLike[str]) -> "Model":
    """A trained run as a model with `.features`, `.reconstruct` and `.config`; see `qbheat_jax.api`."""
    from qbheat_jax import api  # jax is only loaded once it is needed

    return api.load(directory)
