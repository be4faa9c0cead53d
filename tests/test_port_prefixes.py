"""The prefix below which an encoder lies comes off by itself where it is one, and by --prefix where it is the user's to say."""

import numpy as np
import pytest

from qbheat_jax.errors import UserError
from qbheat_jax.port import tables
from qbheat_jax.port.wrappers import unwrap
from tests.test_port_strict import file_of


def encoder(value, arch="resnet18"):
    """{name: array} of an encoder without its classifier, all of one number; no more memory than one number has."""
    return {name: np.broadcast_to(np.float32(value), shape) for name, shape in file_of(arch, 0).items()}


def below(prefix, arrays):
    return {f"{prefix}{name}": array for name, array in arrays.items()}


def value(held):
    assert set(held.arrays) == set(encoder(0))
    return float(held.arrays["bn1.weight"][0])


HEADS = {"projector.0.weight": np.ones((2, 2), np.float32), "head.last_layer.weight_g": np.ones(2, np.float32)}
HEADS["dino_head.mlp.0.weight"] = np.ones((2, 2), np.float32)


@pytest.mark.parametrize(
    "prefix",
    [
        "backbone.",
        "teacher.backbone.",
        "encoder.",
        "model.backbone.",
        "student.",
        "teacher.",
        "module.student.module.backbone.",
        "backbone._orig_mod.",
        "model._orig_mod.encoder.",
        "trunk.body.",
    ],
)
def test_one_prefix_is_taken_off_and_the_rest_is_left_and_said(prefix):
    arrays = {**HEADS, **below(prefix, encoder(1))}
    for arch in ("resnet18", None):
        held = unwrap(arrays, "net.pth", arch=arch)
        assert value(held) == 1 and set(held.dropped) == set(HEADS)
        assert "".join(held.wrappers).endswith(prefix.rpartition("_orig_mod.")[2])
        assert len(held.notices) == 1 and "net.pth" in held.notices[0] and held.wrappers[-1] in held.notices[0]


def test_wrappers_that_all_names_have_come_off_before_it():
    held = unwrap(below("module.model.backbone.", encoder(1)), "net.pth")
    assert value(held) == 1 and held.wrappers == ("module.", "model.", "backbone.")


@pytest.mark.parametrize(
    "taken, other",
    [
        ("teacher.backbone.", "student.backbone."),
        ("teacher_backbone.", "student_backbone."),
        ("backbone.", "momentum_backbone."),
        ("backbone.", "backbone_momentum."),
        ("backbone.", "target_net.module.0."),
        ("online_encoder.net.", "target_encoder.net."),
        ("encoder.", "ema.module."),
    ],
)
def test_of_two_the_usual_one_is_taken_and_prefix_takes_the_other(taken, other):
    for arrays in (
        {**below(other, encoder(2)), **below(taken, encoder(1))},
        {**below(taken, encoder(1)), **below(other, encoder(2))},
    ):
        held = unwrap(arrays, "net.pth")
        assert value(held) == 1 and set(held.dropped) == set(below(other, encoder(2)))
        assert held.wrappers == (taken,) and f"--prefix {other} takes the other" in held.notices[0]
        for asked in (other, other.rstrip(".")):
            held = unwrap(arrays, "net.pth", prefix=asked)
            assert value(held) == 2 and held.wrappers == (other,) and held.notices == ()
            assert set(held.dropped) == set(below(taken, encoder(1)))


def test_of_two_alike_the_user_says_which():
    arrays = {**below("left.", encoder(1)), **below("right.", encoder(2))}
    with pytest.raises(UserError, match=r"2 encoders.*--prefix left\. or --prefix right\.") as caught:
        unwrap(arrays, "net.pth")
    assert caught.value.exit_code == 2
    assert value(unwrap(arrays, "net.pth", prefix="right.")) == 2


def test_only_the_architecture_that_is_asked_for_counts():
    arrays = {**below("teacher.", encoder(1, "resnet50")), **below("student.", encoder(2))}
    assert unwrap(arrays, "net.pth", arch="resnet18").wrappers == ("student.",)
    assert unwrap(arrays, "net.pth", arch="resnet50").wrappers == ("teacher.",)


def test_dinos_whole_checkpoint_holds_dicts_of_two():
    tree = {
        "student": {**below("module.backbone.", encoder(2)), "module.head.mlp.0.weight": np.ones(1)},
        "teacher": {**below("backbone.", encoder(1)), "head.mlp.0.weight": np.ones(1)},
        "optimizer": {"state": {"0": {"exp_avg": np.ones(1)}}, "param_groups": []},
        "epoch": 3,
    }
    held = unwrap(tree, "dino.pth")
    assert value(held) == 1 and held.wrappers == ("teacher.backbone.",)
    assert {"teacher.head.mlp.0.weight", "student.module.backbone.bn1.weight", "optimizer", "epoch"} <= set(
        held.dropped
    )
    assert not any("exp_avg" in name for name in held.dropped)
    assert value(unwrap(tree, "dino.pth", prefix="student.module.backbone.")) == 2
    held = unwrap(tree, "dino.pth", key="student")
    assert value(held) == 2 and held.wrappers == ("student", "module.", "backbone.")


def test_mocos_other_encoder_is_taken_by_prefix():
    arrays = {
        **below("module.encoder_q.", encoder(1)),
        **below("module.encoder_k.", encoder(2)),
        "module.queue": np.ones(1),
    }
    assert value(unwrap(arrays, "moco.pth")) == 1
    assert value(unwrap(arrays, "moco.pth", prefix="encoder_k.")) == 2
    assert value(unwrap(arrays, "moco.pth", prefix="module.encoder_k.")) == 2


def test_heads_of_pre_training_beside_an_encoder_are_left():
    heads = ("projection_head.0.weight", "prototypes.weight", "head.mlp.0.weight", "head.last_layer.weight_g")
    held = unwrap(below("module.", {**encoder(1), **dict.fromkeys(heads, np.ones(1))}), "net.pth.tar")
    assert value(held) == 1 and held.dropped == heads


def test_nothing_is_guessed():
    # Not quite an encoder: the names stay as they are.
    arrays = below("backbone.", {name: array for name, array in encoder(1).items() if not name.startswith("layer4")})
    held = unwrap(arrays, "net.pth")
    assert set(held.arrays) == set(arrays) and held.wrappers == () and held.notices == ()
    # What an optimizer keeps by the weights' names is no encoder.
    held = unwrap(below("state.exp_avg.", encoder(1)), "net.pth")
    assert held.wrappers == ()
    # Names of the encoder itself go before those of a copy of it.
    assert unwrap({**encoder(1), **below("copy.", encoder(2))}, "net.pth").wrappers == ()


def test_a_prefix_that_no_name_has_is_refused_with_those_there_are():
    arrays = {**below("backbone.", encoder(1)), "temperature": np.ones(1)}
    with pytest.raises(UserError, match=r"--prefix trunk\.: .*begin with backbone\., temperature") as caught:
        unwrap(arrays, "net.pth", prefix="trunk")
    assert caught.value.exit_code == 2


def test_hyper_parameters_by_the_name_of_a_model_are_passed_over():
    held = unwrap({"model": {"name": "resnet18"}, "net": encoder(1)}, "net.pth")
    assert value(held) == 1 and held.wrappers == ("net",)


def test_a_dict_by_any_name_holds_an_encoder():
    held = unwrap({"optimized": {"backbone": encoder(1)}, "optimizer": {"backbone": encoder(2)}}, "net.pth")
    assert value(held) == 1 and held.wrappers == ("optimized.backbone.",) and held.dropped == ("optimizer",)


def test_no_word_that_is_taken_out_of_the_midst_of_names_is_an_architectures():
    for arch in ("resnet18", "vit_ti", "mobilenet_v2", "efficientnet_lite0", "mobile_former_26m"):
        assert tables.of(arch) and not any("_module" in name or "_orig" in name for name in file_of(arch))
