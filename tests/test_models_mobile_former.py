"""Mobile-Former against the activations of the released definition, its sizes, and what training needs of it."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from qbheat_jax.models.mobile_former import VARIANTS, MobileFormer, MobileFormerHead, Variant

DATA = pathlib.Path(__file__).parent / "data"

# Names of the released state dict -> paths here, applied in this order.
RENAMES = (
    (r"^features\.(\d+)\.conv\.0\.", r"features.\1.depthwise.conv."),
    (r"^features\.(\d+)\.conv\.1\.", r"features.\1.depthwise.bn."),
    (r"^features\.(\d+)\.conv\.4\.", r"features.\1.pointwise.conv."),
    (r"^features\.(\d+)\.conv\.5\.", r"features.\1.pointwise.bn."),
    (r"^(stem|features\.\d+\.conv\d)\.0\.", r"\1.conv."),
    (r"^(stem|features\.\d+\.conv\d)\.1\.", r"\1.bn."),
    (r"^features\.", "features_"),
    (r"\.hyper\.(\d)", r".fc\1"),
    (r"\.alpha\.0\.", ".alpha."),
    (r"\.ffn\.(\d)", r".ffn\1"),
    (r"^tokens\.weight$", "tokens"),
    (r"^classifier\.conv\.1\.", "head.conv.conv."),
    (r"^classifier\.conv\.2\.", "head.conv.bn."),
    (r"^classifier\.fc\.0\.", "head.fc."),
    (r"^classifier\.fc\.1\.", "head.bn."),
    (r"^classifier\.classifier\.1\.", "head.classifier."),
)


def read(name):
    with safe_open(DATA / name, "np") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


def ported(state_dict):
    """Released names and PyTorch layouts -> (encoder's, head's) variables."""
    variables = {"encoder": {}, "head": {}}
    for name, array in state_dict.items():
        if name.endswith("num_batches_tracked"):
            continue
        for pattern, new in RENAMES:
            name = re.sub(pattern, new, name)
        *path, leaf = name.split(".")
        collection = "params"
        if leaf in ("running_mean", "running_var"):
            collection, leaf = "batch_stats", leaf.removeprefix("running_")
        elif leaf == "weight":
            leaf = "scale" if array.ndim == 1 else "kernel"
            array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        part, path = ("head", path[1:]) if path[:1] == ["head"] else ("encoder", path)
        tree = variables[part].setdefault(collection, {})
        for key in path:
            tree = tree.setdefault(key, {})
        tree[leaf] = array
    return variables["encoder"], variables["head"]


def close(ours, known, error, name):
    np.testing.assert_allclose(ours, known, rtol=0, atol=error, err_msg=name)


@pytest.mark.parametrize("name", ["mobile_former_tiny", "mobile_former_tiny_grouped"])
def test_parity_with_the_released_definition(name):
    state_dict, metadata = read(f"{name}.state_dict.safetensors")
    known, _ = read(f"{name}.activations.safetensors")
    c = json.loads(metadata["config"])
    blocks = tuple(({"DnaBlock": 1, "DnaBlock3": 3}[b[0]], b[1], b[2], b[4], b[5]) for b in c["blocks"])
    variant = Variant(c["stem_chs"], c["token_num"], c["token_dim"], blocks, 0, c["num_features"], c["group_num"])
    encoder, head = MobileFormer(variant), MobileFormerHead(c["num_classes"], variant.features, variant.groups)
    encoder_variables, head_variables = ported(state_dict)

    @jax.jit
    def forward(images):
        features, out = encoder.apply(encoder_variables, images)
        return out, head.apply(head_variables, features, out)

    images = known["input"].transpose(0, 2, 3, 1)

    def init():
        (features, out), variables = encoder.init_with_output(jax.random.key(0), images)
        return variables, head.init(jax.random.key(0), features, out)

    # Every released name has its place, and nothing here is without one.
    ours = jax.tree.map(lambda leaf: leaf.shape, jax.eval_shape(init))
    assert ours == jax.tree.map(np.shape, (encoder_variables, head_variables))

    out, logits = forward(images)
    assert sum(key.endswith(".map") for key in known) == len(blocks)
    for n in range(len(blocks)):
        maps, tokens = np.asarray(out[f"features_{n}"]), np.asarray(out[f"tokens_{n}"])
        close(maps.transpose(0, 3, 1, 2), known[f"features.{n}.map"], 1e-4, f"map {n}")
        close(tokens.transpose(1, 0, 2), known[f"features.{n}.tokens"], 2e-5, f"tokens {n}")
    close(logits, known["logits"], 2e-5, "logits")


def count(variables):
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def initial(module, *args):
    return jax.eval_shape(lambda: module.init(jax.random.key(0), *args))


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("26m", 3_232_788),
        ("52m", 3_469_092),
        ("96m", 4_585_252),
        ("151m", 7_595_828),
        ("214m", 9_425_920),
        ("294m", 11_422_648),
        ("508m", 13_976_976),
    ],
)
def test_size_of_the_released_variants_with_their_classifier(name, parameters):
    variant = VARIANTS[name]
    encoder, head = MobileFormer(variant), MobileFormerHead(1000, variant.features, variant.groups)
    assert (encoder.stride, encoder.width) == (32, variant.blocks[-1][2])
    features = jnp.zeros((1, 1, 1, encoder.width))
    out = {"tokens": jnp.zeros((1, variant.tokens, variant.token_dim))}
    assert count(initial(encoder, jnp.zeros((1, 32, 32, 3)))) + count(initial(head, features, out)) == parameters


@pytest.mark.parametrize("name, parameters", [("w720", 5_011_240), ("w1440", 11_753_328), ("w2880", 25_377_312)])
def test_size_of_the_reconstructed_encoders(name, parameters):
    encoder = MobileFormer(VARIANTS[name])
    assert (encoder.stride, encoder.width) == (16, int(name[1:]))
    norm = 2 * encoder.width  # the count of the reconstruction leaves the last batch norm out
    assert count(initial(encoder, jnp.zeros((1, 32, 32, 3)))) - norm == parameters


def test_tiny_on_images_that_are_not_square():
    encoder = MobileFormer(VARIANTS["tiny"])
    images = jnp.zeros((2, 64, 96, 3))
    (features, out), _ = jax.eval_shape(lambda: encoder.init_with_output(jax.random.key(0), images))
    assert encoder.stride == 8 and features.shape == (2, 8, 12, encoder.width)
    assert out["stem"].shape == (2, 32, 48, 16) and out["tokens"].shape == (2, 3, 64)
    assert {f"features_{n}" for n in range(5)} | {f"tokens_{n}" for n in range(5)} | {"stem", "tokens"} == set(out)


SMALL = Variant(8, 2, 16, ((1, 2, 8, 2, 2),), width=12)


def test_training_in_bfloat16_keeps_float32_parameters_and_a_finite_input_gradient():
    encoder = MobileFormer(SMALL, drop_path=0.2, dtype=jnp.bfloat16)
    random = np.random.default_rng(0)
    images = random.normal(size=(2, 8, 12, 3)).astype(np.float32)
    shapes = initial(encoder, images)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
    variables = jax.tree.map(lambda leaf: random.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)

    @jax.jit
    def step(images):
        def loss(images):
            rngs = {"drop_path": jax.random.key(2)}
            (features, _), updated = encoder.apply(variables, images, True, mutable=["batch_stats"], rngs=rngs)
            return jnp.square(features.astype(jnp.float32)).mean(), (features, updated["batch_stats"])

        (_, (features, updated)), gradient = jax.value_and_grad(loss, has_aux=True)(images)
        return features, updated, gradient

    features, updated, gradient = step(images)
    assert features.dtype == jnp.bfloat16 and features.shape == (2, 2, 3, 12)
    assert np.isfinite(np.float32(features)).all() and float(features.max()) > 0
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0
    assert {leaf.dtype for leaf in jax.tree.leaves(updated)} == {jnp.dtype(jnp.float32)}
    moved = jax.tree.map(lambda a, b: (a != b).any(), variables["batch_stats"], updated)
    assert all(jax.tree.leaves(moved))  # every batch norm has seen the batch
