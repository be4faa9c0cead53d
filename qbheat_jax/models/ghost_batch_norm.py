"""Batch norm over parts of a batch: a model trained on each part of it by itself, side by side."""

import dataclasses
from typing import Any

import jax


def grouped(module, groups):
    """`module`, or, where `groups` is above 1, `module` with its batch split into as many parts for batch norm."""
    return module if groups == 1 or module is None else GhostBatchNorm(module, groups)


@dataclasses.dataclass(frozen=True)
class GhostBatchNorm:
    """A linen module whose batch norms see, in training, `groups` equal parts of the batch [B, ...] each by itself.

    Part k are the rows [k B / groups, (k + 1) B / groups). The running statistics are the mean over the parts of what each
    would have made of them. Everything else, parameters and their names too, is the module's own. Where the parts are a
    multiple of the devices that split the batch, or one each, batch norm needs no communication.
    """

    module: Any
    groups: int

    def __getattr__(self, name):
        return getattr(self.module, name)

    def apply(self, variables, *inputs, rngs=None, mutable=False, **options):
        """As the module's; in training its inputs are arrays [B, ...], or trees of them, and True."""
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
