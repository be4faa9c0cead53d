"""Tables that name every parameter once, released sizes, and a wrong file refused with its likeliest cause."""

import math
import re

import pytest

from qbheat_jax import config as config_lib
from qbheat_jax.errors import UserError
from qbheat_jax.models import registry
from qbheat_jax.port import names, shapes, strict, tables
from qbheat_jax.train import config_tables
from tests.conftest import TESTS_OWN

RELEASED = {
    "mobile_former_26m": 3_232_788,
    "mobile_former_52m": 3_469_092,
    "mobile_former_96m": 4_585_252,
    "mobile_former_151m": 7_595_828,
    "mobile_former_214m": 9_425_920,
    "mobile_former_294m": 11_422_648,
    "mobile_former_508m": 13_976_976,
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "mobilenet_v2": 3_504_872,
    "efficientnet_lite0": 4_652_008,
    "hcnet_t": 27_988_200,
    "hcnet_t_551405": 28_616_936,
    "hcnet_a_t": 28_416_936,
    "convnext_t": 28_589_128,
    "convnext_s": 50_223_688,
    "convnext_b": 88_591_464,
    "vit_ti": 5_717_416,
    "vit_s": 22_050_664,
    "vit_b": 86_567_656,
    "vit_l": 304_326_632,
}
# Encoders that were reconstructed, without a head. The count of the reconstruction leaves the last batch norm out.
RECONSTRUCTED = {
    "mobile_former_w720": 5_011_240 + 2 * 720,
    "mobile_former_w1440": 11_753_328 + 2 * 1440,
    "mobile_former_w2880": 25_377_312 + 2 * 2880,
}
VIT = {"encoder.class_token": True, "encoder.position": "learnt", "encoder.grid": 14}


def config_of(arch, classes=1000, **fields):
    options = VIT if arch.startswith("vit") else {}
    given = {"encoder.name": arch, "head.classes": classes, **options, **fields}
    return config_lib.resolve(given, config_tables.CLASSIFIER)


def file_of(arch, classes=1000, dialect="", **fields):
    """{PyTorch's name: shape} of a whole file of that architecture."""
    leaves = shapes.of(config_of(arch, classes, **fields))
    named = tables.of(arch).torch_names(leaves, dialect)
    return {n: s for path, shape in leaves.items() for n, s in names.torch_shapes(path, shape, named[path]).items()}


def said(found, arch, classes=1000, wrappers=(), **fields):
    """What is said of a file that is ported as `arch`; "" where it fits."""
    table = tables.of(arch)
    config = config_of(arch, classes, **{**table.options(found), **fields})
    plan = strict.plan(found, config, table)
    try:
        strict.check(plan, found, config, table, "some/net.pth", wrappers)
        return ""
    except UserError as error:
        assert str(error).startswith(f"net.pth does not fit {arch}: ")
        return str(error)


# Of families whose other members are traced sooner.
LARGE = ("convnext_b", "convnext_s", "vit_g", "vit_h", "vit_h_plus", "vit_l")


@pytest.mark.parametrize(
    "arch",
    [
        pytest.param(name, marks=[pytest.mark.weekly] * (name in LARGE))
        for name in registry.names()
        if name not in TESTS_OWN
    ],
)
def test_every_parameter_has_a_name_and_released_sizes_are_exact(arch):
    found = file_of(arch, classes=0 if arch not in RELEASED else 1000)
    averages = re.compile(r".*\.running_(mean|var)")
    count = sum(math.prod(shape) for name, shape in found.items() if not averages.fullmatch(name))
    assert count == {**RELEASED, **RECONSTRUCTED}.get(arch, count)
    assert not any("/" in name or "encoder" in name for name in found)
    table = tables.of(arch)
    assert any(map(table.is_head, found)) == (arch in RELEASED)
    signs = table.signs(registry.encoder(arch))
    assert signs and signs.items() <= found.items()


def test_a_file_that_fits_says_nothing_and_running_counts_are_ignored():
    found = {**file_of("resnet18"), "bn1.num_batches_tracked": (), "layer1.0.bn1.num_batches_tracked": ()}
    assert said(found, "resnet18") == ""
    plan = strict.plan(found, config_of("resnet18"), tables.of("resnet18"))
    assert plan.ignored == ("bn1.num_batches_tracked", "layer1.0.bn1.num_batches_tracked")
    assert plan.wanted["params/encoder/layer1_0/conv2/kernel"] == "layer1.0.conv2.weight"


def test_missing_extra_and_misshapen_names_are_listed_ten_of_them():
    found = file_of("resnet18")
    found["bn1.weight"] = (65,)
    found["bn1.more"] = (3,)
    del found["layer1.0.bn1.bias"]
    message = said(found, "resnet18")
    assert "bn1.weight is [65], not [64]" in message and "extra bn1.more [3]" in message
    assert "missing layer1.0.bn1.bias [64]" in message and "more)" not in message
    for n in range(20):
        found[f"extra{n}"] = (n,)
    assert said(found, "resnet18").endswith("extra extra6 [6], and 13 more")


@pytest.mark.parametrize(
    "file, arch",
    [
        pytest.param("mobile_former_294m", "mobile_former_214m", marks=pytest.mark.weekly),
        ("mobile_former_26m", "mobile_former_52m"),
        pytest.param("mobile_former_52m", "mobile_former_26m", marks=pytest.mark.weekly),
        ("resnet50", "resnet18"),
        ("vit_s", "vit_b"),
        ("efficientnet_lite0", "mobilenet_v2"),
        ("mobilenet_v2", "vit_ti"),
        pytest.param("hcnet_a_t", "hcnet_t", marks=pytest.mark.weekly),
        ("hcnet_t_551405", "hcnet_t"),
    ],
)
def test_another_architecture_is_recognised(file, arch):
    for classes in (0, 10):  # whatever its classifier
        assert f"this looks like {file}, you said {arch} (" in said(file_of(file, classes), arch)


def test_names_of_none_of_them_are_listed_and_a_prefix_is_named():
    assert "extra w [3, 3]" in said({"w": (3, 3), "b": (3,)}, "resnet18")
    moved = {f"trunk.{name}": shape for name, shape in file_of("resnet18").items()}
    assert "every name in it begins with trunk.: pass --prefix trunk." in said(moved, "resnet18")


def test_the_classifier_is_the_cause_if_all_else_fits():
    message = said(file_of("vit_s", 21_843), "vit_s")
    assert "the head has 21,843 classes, the config 1,000: pass --head drop, or --classes 21843 (" in message
    assert said(file_of("vit_s", 21_843), "vit_s", classes=21_843) == ""
    assert said(file_of("vit_s", 21_843), "vit_s", classes=0) == ""
    assert "there is no classifier in it: pass --head drop (" in said(file_of("resnet18", 0), "resnet18")
    message = said(file_of("mobile_former_52m", 10), "mobile_former_52m")
    assert (
        "the head has 10 classes" in message
        and "classifier.classifier.1.weight is [10, 1024], not [1000, 1024]" in message
    )
    other = {**file_of("resnet18", 0), "fc.0.0.weight": (2, 2)}
    assert "its classifier is another one: pass --head drop" in said(other, "resnet18")


def test_mocos_projection_is_no_classifier():
    encoder = file_of("resnet50", 0)
    second = {"fc.0.weight": (2048, 2048), "fc.0.bias": (2048,), "fc.2.weight": (128, 2048), "fc.2.bias": (128,)}
    assert "projection of a pre-training method (fc.0 and fc.2)" in said({**encoder, **second}, "resnet50")
    first = {"fc.weight": (128, 2048), "fc.bias": (128,)}
    assert "(fc), not a classifier" in said({**encoder, **first}, "resnet50", wrappers=("MoCo's encoder_q.",))
    plan = strict.plan({**encoder, **second}, config_of("resnet50", 0), tables.of("resnet50"))
    assert not len(plan.differences) and set(plan.dropped) == set(second)


def test_vits_patches_and_position_code():
    eight = file_of("vit_ti", **{"encoder.stride": 8, "encoder.grid": 28})
    assert "this looks like vit_ti with --stride 8, you said vit_ti" in said(eight, "vit_ti", **{"encoder.stride": 16})
    assert said(eight, "vit_ti") == said(eight, "vit_ti", **{"encoder.stride": 8}) == ""  # it is read from the file
    found = file_of("vit_ti")
    large = {**found, "pos_embed": (1, 577, 192)}  # 384 pixels: its own grid is taken
    assert said(large, "vit_ti") == "" and tables.of("vit_ti").options(large)["encoder.grid"] == 24
    with pytest.raises(UserError, match=r"pos_embed \[1, 200, 192\] is the position code of 199 cells"):
        tables.of("vit_ti").options({**found, "pos_embed": (1, 200, 192)})
    for name in ("fc_norm.weight", "dist_token"):
        assert f"extra {name} [192]" in said({**found, name: (192,)}, "vit_ti")
    bare = {name: shape for name, shape in found.items() if name not in ("cls_token", "pos_embed")}
    assert said({**bare, "pos_embed": (1, 196, 192)}, "vit_ti") == ""
    assert "missing pos_embed [1, 196, 192]" in said(bare, "vit_ti")


def test_both_names_of_mobilenets_layers():
    flat = file_of("mobilenet_v2", dialect="flat")
    assert "features.1.conv.3.weight" in flat and flat["features.2.conv.6.weight"] == (24, 96, 1, 1)
    assert said(flat, "mobilenet_v2") == ""
    assert file_of("mobilenet_v2")["features.2.conv.2.weight"] == (24, 96, 1, 1)


def test_an_architecture_without_a_table():
    with pytest.raises(
        UserError, match="--arch resnet101: there is no table of names for it; there is one for .*resnet50"
    ):
        tables.of("resnet101")


def test_layouts_go_there_and_back():
    import numpy as np

    random = np.random.default_rng(0)
    for shape, torch_shape in (((3, 3, 2, 5), (5, 2, 3, 3)), ((4, 7), (7, 4)), ((6,), (6,))):
        array = random.normal(size=shape)
        assert (
            names.to_torch("params/x/kernel", array).shape == torch_shape == names.torch_shape("params/x/kernel", shape)
        )
        assert (names.from_torch("params/x/kernel", names.to_torch("params/x/kernel", array)) == array).all()
    tokens = random.normal(size=(3, 8))
    assert names.to_torch("params/encoder/tokens", tokens).shape == (3, 8)
