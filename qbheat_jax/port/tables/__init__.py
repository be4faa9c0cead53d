"""Tables of parameter names, one file an architecture. Every file of this folder defines TABLE and is found by itself."""

import importlib
import pkgutil

from qbheat_jax.errors import UserError
from qbheat_jax.models import registry

TABLES = tuple(importlib.import_module(f"{__name__}.{file.name}").TABLE for file in pkgutil.iter_modules(__path__))


def of(arch):
    """Return the `Table` of an encoder of the registry. Raise UserError if the encoder or its table does not exist."""
    entry = registry.ENCODERS.get(arch)
    for table in TABLES:
        if entry is not None and table.fits(entry):
            return table
    known = [name for name in registry.names() if any(table.fits(registry.ENCODERS[name]) for table in TABLES)]
    raise UserError(f"--arch {arch}: there is no table of names for it; there is one for {', '.join(known)}")
