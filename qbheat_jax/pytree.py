"""Nested dicts of arrays by leaf name: flatten, match by regular expression, count and compare."""

import re

import jax


def names(tree):
    """Return [(name, leaf), ...] in tree order; a name is the path joined by "/"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [("/".join(_key(k) for k in path), leaf) for path, leaf in leaves]


def _key(entry):
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def map_with_names(function, tree):
    """Return the pytree with every leaf replaced by function(name, leaf)."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function("/".join(map(_key, path)), leaf), tree)


def mask(tree, patterns):
    """Return a pytree of bools: whether any pattern (a regular expression) is found in the leaf's name."""
    compiled = [re.compile(p) for p in patterns]
    return map_with_names(lambda name, _: any(p.search(name) for p in compiled), tree)


def count(tree):
    """Return the total number of elements of all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def filled(tree, defaults, pattern):
    """Return a nested dict with those leaves of `defaults` that it lacks and whose whole name the pattern matches.

    >>> filled({"a": {"x": 1}}, {"a": {"x": 2, "y": 3}, "b": {"y": 4}}, "a/.*")
    {'a': {'x': 1, 'y': 3}}
    """
    found = {name: leaf for name, leaf in names(defaults) if re.fullmatch(pattern, name)} | dict(names(tree))
    result = {}
    for name, leaf in found.items():
        *parents, last = name.split("/")
        node = result
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return result


def differences(expected, found):
    """Return a line for each leaf that is missing, extra or of another shape; [] if the pytrees agree."""
    want, have = dict(names(expected)), dict(names(found))
    lines = [f"missing {n} {tuple(want[n].shape)}" for n in want if n not in have]
    lines += [f"extra {n} {tuple(have[n].shape)}" for n in have if n not in want]
    lines += [
        f"{n} has shape {tuple(have[n].shape)}, expected {tuple(want[n].shape)}"
        for n in want
        if n in have and tuple(have[n].shape) != tuple(want[n].shape)
    ]
    return lines
