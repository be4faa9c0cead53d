"""Initial values: the distributions of the modules' own `init`, from one draw, without a forward pass."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from qbheat_jax import methods, pytree, rng
from qbheat_jax.train import initial, optim, state


def primitives(jaxpr):
    """Names of the primitives of a jaxpr, those within calls and loops too."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation.primitive.name
        for inner in jaxprs_in_params(equation.params):
            yield from primitives(inner)


def leaves(tree):
    return {name: np.asarray(x) for name, x in pytree.names(tree)}


@pytest.mark.parametrize("encoder", ["micro", "vit_micro", "resnet18"])
def test_no_forward_pass_and_one_draw(encoder, small_config):
    config = small_config({"encoder.name": encoder, "image_size": 128})
    optimizer = optim.optimizer(config, lambda n: 1e-3)
    make = state.initialiser(methods.build(config), optimizer, methods.batch_spec(config).shapes(config.batch_size))
    found = list(primitives(jax.make_jaxpr(make)(rng.root(0))))
    assert found.count("random_bits") == 1
    assert not {"dot_general", "conv_general_dilated", "reduce_window_max", "exp"} & set(found)


def test_distributions_are_those_of_the_modules(small_config):
    config = small_config({"encoder.name": "vit_micro", "decoder.width": 64, "decoder.heads": 4})
    objective = methods.build(config)
    batch = {
        name: jnp.zeros(x.shape, x.dtype) for name, x in methods.batch_spec(config).shapes(config.batch_size).items()
    }
    own = leaves(jax.jit(objective.init)(rng.root(1), batch))
    ours = leaves(jax.jit(initial.in_one_draw(objective.init))(rng.root(1), batch))
    assert {n: (x.shape, x.dtype) for n, x in own.items()} == {n: (x.shape, x.dtype) for n, x in ours.items()}
    for name, x in own.items():
        y = ours[name]
        if x.std() == 0.0:
            np.testing.assert_array_equal(x, y, name)
        else:
            error = 5 / np.sqrt(x.size)  # five standard errors, in units of the deviation
            assert abs(y.mean() - x.mean()) < 2 * error * x.std(), name
            assert abs(y.std() / x.std() - 1) < 2 * error, name
            assert not np.array_equal(x, y), name


def test_every_leaf_has_numbers_of_its_own():
    class Twins(nn.Module):
        @nn.compact
        def __call__(self, x):
            return sum(nn.Dense(8, kernel_init=nn.initializers.normal(1.0), name=f"d{n}")(x) for n in range(3))

    made = leaves(initial.in_one_draw(Twins().init)(rng.root(0), jnp.zeros((1, 600))))
    kernels = [x for name, x in made.items() if "kernel" in name]
    correlations = np.corrcoef([x.reshape(-1) for x in kernels])[np.triu_indices(3, 1)]
    assert np.abs(correlations).max() < 5 / np.sqrt(4800)


def test_initialisers_keep_their_distribution():
    """Truncated normals, uniforms and orthogonal matrices, which follow from their bits in several operations."""

    def init(key):
        keys = jax.random.split(key, 3)
        return (
            nn.initializers.lecun_normal()(keys[0], (400, 300)),
            jax.random.uniform(keys[1], (50_000,), minval=2.0, maxval=3.0),
            jax.random.orthogonal(keys[2], 16),
        )

    kernel, uniform, basis = initial.in_one_draw(init)(rng.root(2))
    assert float(kernel.std()) == pytest.approx(400**-0.5, rel=0.02)
    assert 2.0 <= float(uniform.min()) < 2.001 and 2.999 < float(uniform.max()) < 3.0
    np.testing.assert_allclose(basis @ basis.T, np.eye(16), atol=1e-5)


def test_the_key_decides():
    def init(key):
        return jax.random.normal(key, (100,))

    make = initial.in_one_draw(init)
    first, again, other = make(rng.root(0)), make(rng.root(0)), make(rng.root(1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_without_a_draw():
    np.testing.assert_array_equal(initial.in_one_draw(lambda key: jnp.arange(3) + 1)(rng.root(0)), [1, 2, 3])
