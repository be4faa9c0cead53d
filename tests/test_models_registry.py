"""Every name builds an encoder that keeps the contract; every other name, stride or option is refused in words."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qbheat_jax.errors import UserError
from qbheat_jax.models import registry
from qbheat_jax.models.heads import PooledHead
from qbheat_jax.models.mmhco import ClipHead
from qbheat_jax.models.mobile_former import VARIANTS, MobileFormerHead
from qbheat_jax.ops.images import PIXELS
from tests.conftest import TESTS_OWN

MOBILE_FORMERS = [f"mobile_former_{v}" for v in VARIANTS]
CLIPS = ["mmhco_nano", "mmhco_s"]
VHEATS = ["vheat_b", "vheat_b96", "vheat_nano", "vheat_s", "vheat_t"]
HCNETS = ["hcnet_a_t", "hcnet_nano", "hcnet_t", "hcnet_t_551405"]
RESNETS = ["resnet18", "resnet50"]
CONVNEXTS = ["convnext_b", "convnext_s", "convnext_t"]
VITS = ["vit_b", "vit_g", "vit_h", "vit_h_plus", "vit_l", "vit_nano", "vit_s", "vit_s_plus", "vit_ti"]
OTHERS = ["efficientnet_lite0", "mobilenet_v2", *CONVNEXTS, *HCNETS, *RESNETS, *VHEATS, *VITS]
NAMES = sorted([*MOBILE_FORMERS, *OTHERS, *CLIPS])
# Members of families whose other members are traced sooner. test_port_strict.py builds each.
LARGE = (
    *("hcnet_a_t", "hcnet_t", "hcnet_t_551405", "mmhco_s", "vheat_b", "vheat_b96", "vheat_s", "vheat_t"),
    *("convnext_b", "convnext_s", "vit_b", "vit_g", "vit_h", "vit_h_plus", "vit_l", "vit_s", "vit_s_plus"),
    *(f"mobile_former_{v}" for v in VARIANTS if v not in ("26m", "tiny")),
)
CHOICES = [
    pytest.param(name, stride, marks=[pytest.mark.weekly] * (name in LARGE))
    for name in NAMES
    for stride in registry.ENCODERS[name].strides
]


@pytest.fixture(autouse=True)
def without_the_tests_own(monkeypatch):
    """The encoders that the tests add are no part of the registry."""
    for name in TESTS_OWN:
        monkeypatch.delitem(registry.ENCODERS, name, raising=False)


def test_names_are_sorted_and_complete():
    assert registry.names() == NAMES
    released = {f"mobile_former_{v}" for v in ("26m", "52m", "96m", "151m", "214m", "294m", "508m")}
    assert released | {f"mobile_former_{v}" for v in ("w720", "w1440", "w2880", "tiny")} < set(NAMES)


@pytest.mark.parametrize("name, stride", CHOICES)
def test_every_encoder_keeps_the_contract(name, stride):
    encoder = registry.encoder(name, stride=stride, drop_path=0.1, dtype="bfloat16")
    assert (encoder.stride, encoder.drop_path, encoder.dtype) == (stride, 0.1, jnp.bfloat16)
    side = 56 if stride == 14 else 64
    images = jnp.zeros((1, 2, 3, side, 2 * side, 3) if name in CLIPS else (1, side, 2 * side, 3))
    assert encoder.takes_clips == registry.takes_clips(name) == (name in CLIPS)
    assert encoder.example_shape(64, frames=3) == ((2, 3, 64, 64, 3) if name in CLIPS else (64, 64, 3))
    (features, out), variables = jax.eval_shape(lambda: encoder.init_with_output(jax.random.key(0), images))
    assert features.shape == (1, side // stride, 2 * side // stride, encoder.width)
    assert features.dtype == jnp.bfloat16 and set(variables) <= {"params", "batch_stats"}
    assert isinstance(out, dict) and all(jax.tree.leaves(jax.tree.map(lambda leaf: leaf.shape[0] == 1, out)))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    "name, stride",
    [
        ("mobile_former_26m", 32),
        ("mobile_former_w720", 16),
        ("mobile_former_tiny", 8),
        ("resnet18", 32),
        ("resnet50", 32),
        ("mobilenet_v2", 32),
        ("efficientnet_lite0", 32),
        ("vheat_t", 32),
        ("vheat_nano", 8),
        ("hcnet_t", 32),
        ("hcnet_nano", 8),
        ("convnext_t", 32),
        ("vit_ti", 16),
        ("vit_b", 16),
        ("vit_h", 14),
    ],
)
def test_an_encoders_own_stride(name, stride):
    assert registry.encoder(name).stride == registry.encoder(name, stride=0).stride == stride


def test_what_a_name_stands_for():
    small, base = registry.encoder("vit_s", 8), registry.encoder("vit_b")
    assert (small.width, small.heads, small.depth, small.patch) == (384, 6, 12, 8)
    assert (base.width, base.heads, base.depth, base.patch) == (768, 12, 12, 16)
    assert registry.encoder("resnet50").width == 2048 and registry.encoder("resnet18").width == 512
    assert registry.encoder("mobile_former_w720").variant is VARIANTS["w720"]
    learnt = registry.encoder("vit_s", class_token=True, position="learnt", grid=(14, 14))
    assert (learnt.class_token, learnt.position, learnt.grid) == (True, "learnt", (14, 14))


def test_a_dtype_by_name_or_type_makes_the_same_encoder():
    by_name, by_type = registry.encoder("vit_s", dtype="bfloat16"), registry.encoder("vit_s", dtype=jnp.bfloat16)
    assert by_name == by_type and hash(by_name) == hash(by_type)
    assert registry.encoder("vit_s").dtype is jnp.float32


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"name": "resnet-50"}, "encoder 'resnet-50' is unknown; did you mean resnet50?"),
        ({"name": "vit"}, "encoder 'vit' is unknown; did you mean vit_"),
        ({"name": ""}, "encoder '' is unknown"),
        ({"name": "resnet18", "stride": 4}, "encoder resnet18 has no stride 4; it offers 8 or 16 or 32"),
        ({"name": "vit_s", "stride": 32}, "encoder vit_s has no stride 32; it offers 8 or 14 or 16"),
        (
            {"name": "mobile_former_w720", "stride": 32},
            "encoder mobile_former_w720 has no stride 32; it offers 8 or 16",
        ),
        ({"name": "vit_s", "drop_path": 1.0}, "drop_path is 1.0; it must be at least 0 and less than 1"),
        ({"name": "vit_s", "dtype": "float16"}, "dtype is float16; an encoder computes in bfloat16 or float32"),
        ({"name": "vit_s", "dtype": "fast"}, "dtype is fast; an encoder computes in bfloat16 or float32"),
        (
            {"name": "vit_s", "zero_init": True},
            "encoder vit_s has no option zero_init; it takes stride, drop_path, dtype, remat, class_token, position, grid, ",
        ),
    ],
)
def test_refusals(arguments, words):
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        registry.encoder(**arguments)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("mobile_former_26m", 3_232_788),
        ("resnet18", 11_689_512),
    ],
)
def test_size_of_an_encoder_with_its_released_head(name, parameters):
    """Of each kind of head one. The sizes of all encoders are in test_port_strict.py."""
    encoder, head = registry.encoder(name), registry.head(name, 1000, dtype="bfloat16")

    def init():
        (features, out), variables = encoder.init_with_output(jax.random.key(0), jnp.zeros((2, 224, 224, 3)))
        logits, head_variables = head.init_with_output(jax.random.key(0), features, out)
        return logits, (variables["params"], head_variables["params"])

    logits, params = jax.eval_shape(init)
    assert logits.shape == (2, 1000) and logits.dtype == jnp.float32
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters


def test_heads_are_the_released_ones():
    head = registry.head("mobile_former_26m", 10, dropout=0.1, dtype="bfloat16")
    assert head == MobileFormerHead(10, 1024, 4, 0.1, jnp.bfloat16)
    for name in (*OTHERS, "mobile_former_w720", "mobile_former_tiny"):  # the last two were released without
        std = 0.02 if name in (*CONVNEXTS, *HCNETS, *VHEATS) else 0.01
        assert registry.head(name, 10, dropout=0.1) == PooledHead(10, 0.1, std)
    assert registry.head("mmhco_s", 10, dropout=0.1) == ClipHead(10, 0.1)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("resnet51", 10), "encoder 'resnet51' is unknown; did you mean resnet50?"),
        (("resnet50", 0), "classes is 0; a head needs a whole number of them, at least 1"),
        (("resnet50", 2.5), "classes is 2.5; a head needs a whole number"),
        (("resnet50", 10, 1.0), "dropout is 1.0; it must be at least 0 and less than 1"),
        (("resnet50", 10, 0.0, "float16"), "dtype is float16; an encoder computes in bfloat16 or float32"),
    ],
)
def test_refusals_of_heads(arguments, words):
    with pytest.raises(UserError, match=re.escape(words)):
        registry.head(*arguments)


def test_released_pixels():
    for name in set(NAMES) - {"efficientnet_lite0"}:
        assert registry.released_pixels(name) == "imagenet"
    lite = PIXELS[registry.released_pixels("efficientnet_lite0")]
    np.testing.assert_allclose(lite.normalise(np.full(3, 200, np.uint8)), [(200 - 127) / 128] * 3, rtol=1e-6)
    with pytest.raises(UserError, match="encoder 'lite0' is unknown"):
        registry.released_pixels("lite0")


def test_an_unknown_name_lists_them_all():
    with pytest.raises(UserError) as caught:
        registry.encoder("q")
    assert ", ".join(NAMES) in str(caught.value)
