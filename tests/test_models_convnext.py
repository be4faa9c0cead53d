"""ConvNeXt: patches and blocks against their definition, sizes, order of layers, shapes at both strides."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qbheat_jax.models import registry
from qbheat_jax.models.convnext import ConvNeXt, Patches

TINY = {"dims": (8, 8, 8, 16), "depths": (1, 1, 2, 1)}


def shapes_of(module, *args):
    return jax.eval_shape(lambda: module.init(jax.random.key(0), *args))


@pytest.mark.parametrize("size, stride", [(4, 4), (2, 2), (2, 1)])
def test_patches_are_torchs_convolution(size, stride):
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(0)
    x = random.normal(size=(2, 8, 12, 3)).astype(np.float32)
    kernel, bias = (random.normal(size=shape).astype(np.float32) for shape in ((size, size, 3, 5), (5,)))
    variables = {"params": {"kernel": kernel, "bias": bias}}
    ours = Patches(5, size, stride).apply(variables, x)
    kernel, image = torch.from_numpy(kernel).permute(3, 2, 0, 1), torch.from_numpy(x).permute(0, 3, 1, 2)
    after = 0 if stride == size else size - 1  # zeros after the last row and column
    image = torch.nn.functional.pad(image, (0, after, 0, after))
    known = torch.nn.functional.conv2d(image, kernel, torch.from_numpy(bias), stride).permute(0, 2, 3, 1)
    np.testing.assert_allclose(ours, known.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("last, stride", [(2, 32), (1, 16)])
def test_shapes_and_types(last, stride):
    encoder = ConvNeXt(**TINY, last_stride=last, dtype=jnp.bfloat16)
    images = jnp.zeros((2, 64, 96, 3))
    (features, out), variables = jax.eval_shape(lambda: encoder.init_with_output(jax.random.key(0), images))
    assert (encoder.stride, encoder.width) == (stride, 16)
    assert features.shape == (2, 64 // stride, 96 // stride, 16) == out["stage4"].shape
    assert [out[name].shape[1] for name in ("stem", "stage1", "stage2", "stage3")] == [16, 16, 8, 4]
    assert out["pooled"].shape == (2, 16)
    assert {leaf.dtype for leaf in jax.tree.leaves((features, out))} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    with pytest.raises(ValueError, match=f"multiples of {stride}"):
        shapes_of(encoder, jnp.zeros((1, 40, 64, 3)))


def test_every_parameter_has_its_place_in_the_order_of_layers():
    encoder = ConvNeXt(**TINY)
    places = {
        "stem/kernel": 6, "stem_norm/scale": 6, "layers_0_0/gamma": 5, "down_1/kernel": 4, "down_1_norm/bias": 4,
        "layers_1_0/conv/kernel": 4, "layers_2_0/fc1/kernel": 3, "layers_2_1/fc2/bias": 2, "down_3/bias": 1,
        "layers_3_0/norm/scale": 1, "norm/scale": 0,
    }  # fmt: skip
    assert {name: encoder.layer_of(name) for name in places} == places
    tops = {name.split("/")[0] for name in places}
    assert set(shapes_of(encoder, jnp.zeros((1, 32, 32, 3)))["params"]) - tops == {
        "down_2",
        "down_2_norm",
        "down_3_norm",
    }


def test_rates_of_drop_path_and_what_the_classifier_takes():
    rates = []

    def record(next_call, args, kwargs, context):
        if type(context.module).__name__ == "DropPath":
            rates.append(context.module.rate)
        return next_call(*args, **kwargs)

    with nn.intercept_methods(record):
        shapes_of(ConvNeXt(**TINY, drop_path=0.4), jnp.zeros((1, 32, 32, 3)))
    np.testing.assert_allclose(rates, [0, 0.1, 0.2, 0.3, 0.4])
    head, pooled = registry.head("convnext_t", 3), np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)
    maps = jnp.zeros((2, 2, 2, 16))
    logits, variables = head.init_with_output(jax.random.key(0), maps, {"pooled": pooled})
    kernel = variables["params"]["classifier"]["kernel"]
    np.testing.assert_allclose(logits, pooled @ kernel, rtol=1e-5, atol=1e-6)
