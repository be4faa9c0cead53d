"""Names, masks and differences of nested arrays; keys that depend on their name and step and on nothing else."""

import typing

import jax
import numpy as np

from qbheat_jax import pytree, rng

TREE = {"encoder": {"conv": {"kernel": np.zeros((3, 4)), "bias": np.ones(4)}}, "heat": {"x+": np.zeros((2, 2))}}


class Moments(typing.NamedTuple):
    count: np.ndarray
    mu: dict


def test_names_are_paths_in_tree_order():
    named = pytree.names(TREE)
    assert [name for name, _ in named] == ["encoder/conv/bias", "encoder/conv/kernel", "heat/x+"]
    assert all(a is b for (_, a), b in zip(named, jax.tree.leaves(TREE)))


def test_names_of_tuples_and_optimizer_states():
    tree = (Moments(np.zeros(()), {"w": np.zeros(2)}), [np.zeros(1)])
    assert [name for name, _ in pytree.names(tree)] == ["0/count", "0/mu/w", "1/0"]


def test_map_with_names_keeps_the_structure():
    mapped = pytree.map_with_names(lambda name, leaf: (name, leaf.shape), TREE)
    assert mapped["encoder"]["conv"]["kernel"] == ("encoder/conv/kernel", (3, 4))
    assert mapped["heat"]["x+"] == ("heat/x+", (2, 2))


def test_mask_searches_any_of_the_patterns():
    assert pytree.mask(TREE, ["bias$", "^heat/"]) == {
        "encoder": {"conv": {"kernel": False, "bias": True}}, "heat": {"x+": True}
    }  # fmt: skip
    assert not any(jax.tree.leaves(pytree.mask(TREE, [])))
    assert not any(jax.tree.leaves(pytree.mask(TREE, ["^conv", "Kernel"])))


def test_count_is_of_numbers():
    assert pytree.count(TREE) == 12 + 4 + 4
    assert pytree.count(jax.eval_shape(lambda: TREE)) == 20


def test_differences_name_each_leaf_and_its_shapes():
    assert pytree.differences(TREE, jax.tree.map(np.ones_like, TREE)) == []
    found = {"encoder": {"conv": {"kernel": np.zeros((4, 3)), "scale": np.ones(4)}}, "heat": {"x+": np.zeros((2, 2))}}
    assert sorted(pytree.differences(TREE, found)) == [
        "encoder/conv/kernel has shape (4, 3), expected (3, 4)",
        "extra encoder/conv/scale (4,)",
        "missing encoder/conv/bias (4,)",
    ]


def bits(key):
    return tuple(int(n) for n in jax.random.key_data(key))


def test_keys_depend_on_seed_name_and_step_and_on_nothing_else():
    def key(seed, name, step=None):
        return bits(rng.fold(rng.root(seed), name, step))

    asked = [(0, "init"), (0, "step"), (1, "init"), (0, "init", 0), (0, "init", 1), (0, "step", 1), (1, "step", 1)]
    assert len({key(*a) for a in asked}) == len(asked)
    assert [key(*a) for a in asked] == [key(*a) for a in asked]


def test_keys_are_the_same_in_every_release():
    """A run started by one version goes on with the same numbers in the next: these bits must never change."""
    assert bits(rng.fold(rng.root(0), "dropout", 7)) == (2631462806, 2197055503)


def test_steps_may_be_traced():
    traced = jax.jit(lambda step: jax.random.key_data(rng.fold(rng.root(3), "dropout", step)))(11)
    assert tuple(map(int, traced)) == bits(rng.fold(rng.root(3), "dropout", 11))
