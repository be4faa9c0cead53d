"""What is wrapped around a state dict: dicts of dicts, prefixes of names, and parts of a method that are no encoder.

Everything that is taken off is reported, and what is dropped with it.
"""

import dataclasses
import re

import numpy as np

from qbheat_jax.errors import UserError

# Keys under which training scripts keep the state dict, the usual ones first: of several the first is taken.
KEYS = ("state_dict", "model", "state_dict_ema", "model_ema", "model_state_dict", "model_state", "net", "network")
# Prefixes that wrappers of modules put before every name (DataParallel, torch.compile, Lightning).
PREFIXES = ("module.", "_orig_mod.", "model.")


@dataclasses.dataclass(frozen=True)
class Method:
    """A pre-training method's checkpoint: known by `sign`, a name it holds; `drop`: names that are not its encoder's."""

    name: str
    sign: str
    prefix: str
    drop: str


METHODS = (
    Method("MoCo", r"encoder_q\..+", "encoder_q.", r"encoder_k\..+|queue|queue_ptr"),
    Method("MAE", r"mask_token|decoder_blocks\..+", "", r"mask_token|decoder_.+"),
)


@dataclasses.dataclass(frozen=True)
class Unwrapped:
    """`arrays`: {name: array}. `wrappers`: what was taken off, from the outside in. `dropped`: names left behind.

    `key`: the dict's, where it was in one. `notices`: what a user should know, one sentence each.
    """

    arrays: dict
    wrappers: tuple
    dropped: tuple
    key: str = ""
    notices: tuple = ()


def unwrap(tree, source, key=None):
    """What `files.read` returns -> Unwrapped. `key`: the dict to take, dots between levels; None: by the rules above."""
    wrappers, notices = [], []
    for step in key.split(".") if key else ():
        tree = _pick(tree, step, key, source)
        wrappers.append(step)
    while held := [name for name in KEYS if isinstance(tree.get(name), dict) and tree[name]]:
        if len(held) > 1:
            others = " or ".join(f"--key {'.'.join([*wrappers, name])}" for name in held[1:])
            notices.append(f"{source} holds {' and '.join(held)}: {held[0]} is taken ({others} takes the other)")
        wrappers.append(held[0])
        tree = tree[held[0]]
    key = ".".join(wrappers)
    if not any(isinstance(value, np.ndarray) for value in tree.values()):
        raise UserError(
            f"{source} holds no weights by a name that is known: it has {_listed(tree)}; pick one with --key"
        )
    arrays = {name: value for name, value in tree.items() if isinstance(value, np.ndarray)}
    dropped = [name for name in tree if name not in arrays]
    arrays = _without_prefixes(arrays, wrappers)
    for method in METHODS:
        if any(re.fullmatch(method.sign, name) for name in arrays):
            arrays, left = _encoder_of(method, arrays)
            dropped += left
            wrappers.append(f"{method.name}'s {method.prefix or 'checkpoint'}")
            arrays = _without_prefixes(arrays, wrappers)
    return Unwrapped(arrays, tuple(wrappers), tuple(dropped), key, tuple(notices))


def _pick(tree, step, key, source):
    if isinstance(tree.get(step), dict):
        return tree[step]
    raise UserError(f"--key {key}: {source} has no dict {step!r} there; it has {_listed(tree)}")


def _listed(tree):
    names = [str(name) for name in tree]
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") or "nothing"


def _without_prefixes(arrays, wrappers):
    while True:
        prefix = next((p for p in PREFIXES if arrays and all(name.startswith(p) for name in arrays)), None)
        if prefix is None:
            return arrays
        wrappers.append(prefix)
        arrays = {name.removeprefix(prefix): array for name, array in arrays.items()}


def _encoder_of(method, arrays):
    """-> ({name without the method's prefix: array}, names dropped)."""
    dropped = [name for name in arrays if re.fullmatch(method.drop, name)]
    kept = {name.removeprefix(method.prefix): array for name, array in arrays.items() if name not in set(dropped)}
    return kept, dropped
