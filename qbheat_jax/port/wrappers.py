"""Unwrap a state dict: nested dicts, prefixes of names, and parts of a pre-training method beside the encoder.

Everything removed or dropped is reported.
"""

import dataclasses
import re

import numpy as np

from qbheat_jax.errors import UserError
from qbheat_jax.port import prefixes

# Keys of state dicts in checkpoints, in order of preference.
KEYS = ("state_dict", "model", "state_dict_ema", "model_ema", "model_state_dict", "model_state", "net", "network")
# Prefixes that module wrappers add to every name (DataParallel, torch.compile, Lightning, FSDP).
PREFIXES = ("module.", "_orig_mod.", "model.", "_fsdp_wrapped_module.")
# The name that Hugging Face's models give the encoder beside a head or, in CLIP, beside the text tower.
_BASE = re.compile(r"(vit|dinov2|dinov2_with_registers|convnext|vision_model)\.")
_BESIDE_BASE = re.compile(r"(classifier|text_model|\w+_projection)\.|logit_scale")
# Parts that wrappers of submodules insert into names.
_INNER = re.compile(r"(?<=\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

# Dicts that are not searched for an encoder.
_BESIDE = re.compile(r"optimizer|scheduler|scaler")


@dataclasses.dataclass(frozen=True)
class Method:
    """A pre-training method's checkpoint, known by a name `sign`. `drop`: names that are not the encoder's."""

    name: str
    sign: str
    prefix: str
    drop: str


# Heads of SwAV, SimCLR, Barlow Twins, BYOL, DINO and others.
_HEADS = (
    r"(projector|predictor|projection_head|prediction_head|prototypes|head\.mlp|head\.last_layer|dino_head|ibot_head)"
)
METHODS = (
    Method("MoCo", r"encoder_q\..+", "encoder_q.", r"encoder_k\..+|queue|queue_ptr"),
    Method("MAE", r"decoder_(blocks|embed)\..+", "", r"mask_token|decoder_.+"),
    Method("the pre-training method", rf"{_HEADS}\..+", "", rf"{_HEADS}\..+"),
)


@dataclasses.dataclass(frozen=True)
class Unwrapped:
    """An unwrapped state dict.

    Attributes:
      arrays: {name: array}.
      wrappers: what was removed, from the outside in.
      dropped: names left behind.
      key: of the dict that held it.
      notices: sentences for the user.
    """

    arrays: dict
    wrappers: tuple
    dropped: tuple
    key: str = ""
    notices: tuple = ()


@dataclasses.dataclass(frozen=True)
class _Layer:
    """One removed wrapper: `arrays` by shorter names, `dropped` names, a `notice` or ""."""

    wrapper: str
    arrays: dict
    dropped: list = dataclasses.field(default_factory=list)
    notice: str = ""


def unwrap(tree, source, key=None, prefix=None, arch=None):
    """Return the Unwrapped state dict of a tree that `files.read` returned.

    Args:
      tree: nested dicts.
      source: name of the file, for messages.
      key: the dict to take, dots between levels; None: the first of KEYS.
      prefix: of the names to take; None: the one below which an encoder is found.
      arch: the encoder; None: any of the registry.
    """
    wrappers, notices = [], []
    for step in key.split(".") if key else ():
        tree = _pick(tree, step, key, source)
        wrappers.append(step)
    while held := [name for name in KEYS if isinstance(tree.get(name), dict) and _flat(tree[name])]:
        if len(held) > 1:
            others = " or ".join(f"--key {'.'.join([*wrappers, name])}" for name in held[1:])
            notices.append(f"{source} holds {' and '.join(held)}: {held[0]} is taken ({others} takes the other)")
        wrappers.append(held[0])
        tree = tree[held[0]]
    key = ".".join(wrappers)
    arrays = _weights(tree, source, prefix, arch)
    dropped = [name for name in tree if not any(held == name or held.startswith(f"{name}.") for held in arrays)]
    asked = f"{prefix.rstrip('.')}." if prefix else ""
    while layer := _outermost(arrays, source, asked, arch):
        wrappers.append(layer.wrapper)
        arrays = layer.arrays
        dropped += layer.dropped
        notices += [layer.notice] if layer.notice else []
        asked = "" if layer.wrapper == asked else asked
    if asked:
        raise UserError(f"--prefix {asked}: no name in {source} begins so; they begin with {_beginnings(arrays)}")
    return Unwrapped(arrays, tuple(wrappers), tuple(dropped), key, tuple(notices))


def _weights(tree, source, prefix, arch):
    """Return {name: array} of a dict, or of the nested dicts, dots between levels, where these hold the encoder."""
    arrays = {name: value for name, value in tree.items() if isinstance(value, np.ndarray)}
    every = _flat({name: value for name, value in tree.items() if not _BESIDE.search(name)})
    if len(every) > len(arrays) and (prefix or (not _found(arrays, arch) and _found(every, arch))):
        return every
    if arrays:
        return arrays
    raise UserError(f"{source} holds no weights by a name that is known: it has {_listed(tree)}; pick one with --key")


def _flat(tree, above=""):
    """Return {name: array} of nested dicts, dots between levels."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{above}{name}."))
        elif isinstance(value, np.ndarray):
            flat[above + name] = value
    return flat


def _found(arrays, arch):
    return prefixes.find({name: array.shape for name, array in arrays.items()}, arch)


def _pick(tree, step, key, source):
    if isinstance(tree.get(step), dict):
        return tree[step]
    raise UserError(f"--key {key}: {source} has no dict {step!r} there; it has {_listed(tree)}")


def _listed(tree):
    names = [str(name) for name in tree]
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") or "nothing"


def _beginnings(arrays):
    return _listed(dict.fromkeys(f"{name.partition('.')[0]}." if "." in name else name for name in arrays))


def _outermost(arrays, source, asked, arch):
    """Return the outermost wrapper of names as a _Layer, or None. `asked`: the user's prefix, "" for none."""
    if asked and any(name.startswith(asked) for name in arrays):
        return _Layer(asked, *prefixes.below(arrays, asked))
    for prefix in PREFIXES:
        if arrays and all(name.startswith(prefix) for name in arrays):
            return _Layer(prefix, *prefixes.below(arrays, prefix))
    if inner := sorted({match for name in arrays for match in _INNER.findall(name)}):
        return _Layer(" and ".join(f"{name}." for name in inner), {_INNER.sub("", n): a for n, a in arrays.items()})
    bases = {match[0] if match else "" for match in map(_BASE.match, arrays)}
    if len(bases - {""}) == 1 and all(_BASE.match(name) or _BESIDE_BASE.match(name) for name in arrays):
        (base,) = bases - {""}
        return _Layer(base, {name.removeprefix(base): array for name, array in arrays.items()})
    methods = [m for m in METHODS if any(re.fullmatch(m.sign, name) for name in arrays)]
    for method in methods:
        if method.prefix:
            return _encoder_of(method, arrays)
    found = [] if asked else _found(arrays, arch)
    if found and "" not in found:
        prefix, notice = prefixes.choose(found, source)
        return _Layer(prefix, *prefixes.below(arrays, prefix), notice)
    return _encoder_of(methods[0], arrays) if methods else None


def _encoder_of(method, arrays):
    """Return the _Layer of a pre-training method."""
    dropped = [name for name in arrays if re.fullmatch(method.drop, name)]
    kept = {name.removeprefix(method.prefix): array for name, array in arrays.items() if name not in set(dropped)}
    return _Layer(f"{method.name}'s {method.prefix or 'checkpoint'}", kept, dropped)
