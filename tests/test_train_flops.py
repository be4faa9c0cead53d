"""Counted operations against closed forms: matrices, convolutions and their gradients, control flow, a train step."""

import jax
import jax.numpy as jnp
import pytest

from qbheat_jax.train import flops


def count(function, *shapes):
    return flops.count(jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)))


def test_matrix_products():
    assert count(jnp.matmul, (3, 4), (4, 5)) == 2 * 3 * 4 * 5
    assert count(jnp.matmul, (7, 3, 4), (7, 4, 5)) == 7 * 2 * 3 * 4 * 5
    assert count(lambda a, b: jnp.einsum("bij,kj->bik", a, b), (7, 3, 4), (5, 4)) == 7 * 2 * 3 * 4 * 5


def conv(groups=1, stride=1):
    return lambda x, kernel: jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_and_their_gradients(groups, stride):
    x, kernel = (4, 16, 16, 8), (3, 3, 8 // groups, 24)
    forward = 2 * 4 * (16 // stride) ** 2 * 24 * 9 * (8 // groups)
    assert count(conv(groups, stride), x, kernel) == forward
    outputs = 4 * (16 // stride) ** 2 * 24

    def summed(x, kernel):
        return conv(groups, stride)(x, kernel).sum()

    # Two gradients, each as many multiply-adds as the convolution, and the sum itself; the edges differ a little.
    assert count(jax.grad(summed, (0, 1)), x, kernel) == pytest.approx(3 * forward + outputs, rel=0.15)


def test_elementwise_and_reductions():
    assert count(lambda x: jnp.exp(x) * x, (3, 5)) == 30
    assert count(lambda x: x.sum(0), (3, 5)) == 15
    assert count(lambda x: x.max(), (3, 5)) == 15
    assert count(lambda x: x.T.reshape(5, 3)[:2].astype(jnp.bfloat16), (3, 5)) == 0
    assert count(lambda x: jnp.argsort(x) + 1, (3, 5)) == 0  # integers


def test_a_scan_counts_as_often_as_it_runs():
    def power(a):
        return jax.lax.scan(lambda c, _: (c @ a, None), a, None, length=7)[0]

    assert count(power, (4, 4)) == 7 * 2 * 4**3
    nested = jax.vmap(power)
    assert count(nested, (3, 4, 4)) == 3 * 7 * 2 * 4**3


def test_a_while_loop_counts_once_and_a_cond_its_dearest_branch():
    def loop(a):
        return jax.lax.while_loop(lambda c: c[0, 0] < 9, lambda c: c @ a, a)

    assert count(loop, (4, 4)) == 2 * 4**3

    def choice(a):
        return jax.lax.cond(a[0, 0] > 0, lambda a: a @ a, lambda a: a + 1, a)

    assert count(choice, (4, 4)) == 2 * 4**3


def test_what_is_wrapped_is_counted():
    doubled = jax.custom_vjp(lambda a: a @ a)
    doubled.defvjp(lambda a: (a @ a, a), lambda a, g: (g @ a,))
    tangent = jax.custom_jvp(lambda a: a @ a)
    tangent.defjvps(lambda t, out, a: t @ a)
    for wrapped in (jax.jit(lambda a: a @ a), jax.checkpoint(lambda a: a @ a), doubled, tangent):
        assert count(wrapped, (4, 4)) == 2 * 4**3
    assert count(lambda a: jax.grad(lambda a: doubled(a).sum())(a), (4, 4)) == 2 * 2 * 4**3 + 16
    # Rematerialised, the product inside is made twice, and its two gradients once.
    kept = count(jax.grad(lambda a: jnp.sin(a @ a).sum()), (4, 4))
    again = count(jax.grad(lambda a: jax.checkpoint(lambda a: jnp.sin(a @ a))(a).sum()), (4, 4))
    assert again - kept >= 2 * 4**3


def test_the_gradient_of_an_mlp_is_three_times_the_mlp():
    def mlp(weights, x):
        for w in weights:
            x = jax.nn.relu(x @ w)
        return x.sum()

    sizes, batch = (128, 256, 256, 128), 64
    weights = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in zip(sizes, sizes[1:])]
    x = jax.ShapeDtypeStruct((batch, 128), jnp.float32)
    forward = flops.count(jax.make_jaxpr(mlp)(weights, x))
    products = 2 * batch * sum(a * b for a, b in zip(sizes, sizes[1:]))
    assert products < forward < 1.02 * products
    both = flops.count(jax.make_jaxpr(jax.grad(mlp))(weights, x))
    # With respect to the weights alone: the first layer's input needs no gradient.
    assert both == pytest.approx(3 * products - 2 * batch * 128 * 256, rel=0.02)


def test_depthwise_counts_the_same_in_both_its_forms():
    from qbheat_jax.models import kernels

    x, kernel, pad = (2, 16, 16, 8), (3, 3, 1, 8), ((1, 1), (1, 1))
    grouped = count(lambda x, k: kernels._grouped(x, k, 1, pad), x, kernel)
    assert grouped == 2 * 9 * 2 * 16 * 16 * 8
    shifted = count(lambda x, k: kernels._shifted(kernels._padded(x, pad), k, 1), x, kernel)
    assert shifted == pytest.approx(grouped, rel=0.01)
    assert count(lambda x, k: kernels.depthwise_conv(x, k), x, kernel) == pytest.approx(grouped, rel=0.01)


@pytest.mark.parametrize("channels, stride", [(3, 2), (8, 1)])
def test_a_convolution_counts_as_the_plain_one_and_its_gradients_as_two(channels, stride):
    from qbheat_jax.models import kernels

    x, kernel, size = (2, 16, 16, channels), (3, 3, channels, 8), 16 // stride
    forward = 2 * 9 * channels * 2 * size**2 * 8
    assert count(lambda x, k: kernels.conv(x, k, stride), x, kernel) == forward
    both = count(
        lambda x, k, g: jax.vjp(lambda x, k: kernels.conv(x, k, stride), x, k)[1](g), x, kernel, (2, size, size, 8)
    )
    assert both == pytest.approx(3 * forward, rel=0.01)


def test_a_jitted_function_is_traced_with_shapes_alone():
    traced = jax.jit(jnp.matmul).trace(jax.ShapeDtypeStruct((3, 4), jnp.float32), jax.ShapeDtypeStruct((4, 5), "f4"))
    assert flops.count(traced.jaxpr) == 120
