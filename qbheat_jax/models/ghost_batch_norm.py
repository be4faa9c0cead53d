"""Ghost batch norm: batch statistics over equal groups of the batch instead of the whole."""

import dataclasses
from typing import Any

import jax


def grouped(module, groups):
    """Return `module`, wrapped in GhostBatchNorm where `groups` is above 1."""
    return module if groups == 1 or module is None else GhostBatchNorm(module, groups)


@dataclasses.dataclass(frozen=True)
class GhostBatchNorm:
    """A linen module whose batch norms train on `groups` equal groups of the batch [B, ...] separately.

    Group k has the rows [k B / groups, (k + 1) B / groups). Running statistics are averaged over the groups. All else is the
    module's own, its parameters and their names included. Batch norm needs no communication where the groups are a multiple
    of the devices that split the batch.
    """

    module: Any
    groups: int

    def __getattr__(self, name):
        return getattr(self.module, name)

    def clone(self, **options):
        """Return the same with other options of the module."""
        return GhostBatchNorm(self.module.clone(**options), self.groups)

    def apply(self, variables, *inputs, rngs=None, mutable=False, **options):
        """Apply the module; group by group if `mutable`. `inputs` are then arrays [B, ...], or trees of them, and True."""
        if not mutable:
            return self.module.apply(variables, *inputs, rngs=rngs, **options)
        *arrays, train = inputs

        def parts(x):
            return x.reshape(self.groups, x.shape[0] // self.groups, *x.shape[1:])

        def one(part, options, rngs):
            return self.module.apply(variables, *part, train, rngs=rngs, mutable=mutable, **options)

        rngs = {name: jax.random.split(key, self.groups) for name, key in (rngs or {}).items()}
        outputs, updated = jax.vmap(one)(jax.tree.map(parts, arrays), jax.tree.map(parts, options), rngs)
        outputs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)
        return outputs, jax.tree.map(lambda x: x.mean(0), updated)
