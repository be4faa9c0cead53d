"""What is wrapped around a state dict comes off, and what was taken off or left behind is said."""

import numpy as np
import pytest

from qbheat_jax.errors import UserError
from qbheat_jax.port.wrappers import unwrap

ONE, TWO = np.ones(1, np.float32), np.full(1, 2, np.float32)


def names(tree, key=None):
    return list(unwrap(tree, "net.pth", key).arrays)


@pytest.mark.parametrize(
    "tree, wrappers",
    [
        ({"a.weight": ONE}, ()),
        ({"state_dict": {"a.weight": ONE}, "epoch": 3, "best": ONE, "optimizer": {"state": {0: ONE}}}, ("state_dict",)),
        ({"model": {"a.weight": ONE}}, ("model",)),
        ({"state_dict_ema": {"module.a.weight": ONE}}, ("state_dict_ema", "module.")),
        (
            {"model": {"state_dict": {"_orig_mod.module.a.weight": ONE}}},
            ("model", "state_dict", "_orig_mod.", "module."),
        ),
        ({"model.a.weight": ONE, "model.a.bias": ONE}, ("model.",)),
    ],
)
def test_wrappers_come_off_and_are_named(tree, wrappers):
    held = unwrap(tree, "net.pth")
    assert set(held.arrays) <= {"a.weight", "a.bias"} and "a.weight" in held.arrays
    assert held.wrappers == wrappers and held.dropped == () and held.notices == ()


def test_a_prefix_that_not_every_name_has_stays():
    assert names({"module.a.weight": ONE, "b.weight": ONE}) == ["module.a.weight", "b.weight"]


def test_of_a_state_dict_and_its_average_the_first_is_taken_and_said():
    tree = {"state_dict_ema": {"a": TWO}, "state_dict": {"a": ONE}}
    held = unwrap(tree, "net.pth")
    assert held.arrays["a"] is ONE and held.key == "state_dict"
    assert "state_dict is taken" in held.notices[0] and "--key state_dict_ema" in held.notices[0]
    held = unwrap(tree, "net.pth", "state_dict_ema")
    assert held.arrays["a"] is TWO and held.key == "state_dict_ema" and held.notices == ()


def test_key_goes_as_deep_as_it_says_and_names_what_there_is():
    tree = {"teacher": {"backbone": {"a.weight": ONE}, "head": {"b": ONE}}, "student": {}, "step": 3}
    held = unwrap(tree, "net.pth", "teacher.backbone")
    assert list(held.arrays) == ["a.weight"] and held.wrappers == ("teacher", "backbone")
    with pytest.raises(UserError, match="--key teacher.neck: net.pth has no dict 'neck' there; it has backbone, head"):
        unwrap(tree, "net.pth", "teacher.neck")
    with pytest.raises(UserError, match="no dict 'step' there; it has teacher, student, step"):
        unwrap(tree, "net.pth", "step")
    with pytest.raises(UserError, match="holds no weights by a name that is known: it has teacher, student, step"):
        unwrap(tree, "net.pth")
    with pytest.raises(UserError, match="it has nothing"):
        unwrap({}, "net.pth")
    with pytest.raises(UserError, match="k9 and 5 more"):
        unwrap({f"k{n}": n for n in range(15)}, "net.pth")


def test_of_moco_the_query_encoder_is_taken():
    held = unwrap(
        {
            "epoch": 800,
            "state_dict": {
                "module.encoder_q.conv1.weight": ONE,
                "module.encoder_q.fc.0.weight": ONE,
                "module.encoder_k.conv1.weight": TWO,
                "module.queue": TWO,
                "module.queue_ptr": TWO,
            },
        },
        "moco.pth.tar",
    )
    assert held.arrays == {"conv1.weight": ONE, "fc.0.weight": ONE}
    assert held.wrappers == ("state_dict", "module.", "MoCo's encoder_q.")
    assert held.dropped == ("encoder_k.conv1.weight", "queue", "queue_ptr")


def test_of_mae_the_decoder_is_left():
    tree = {"cls_token": ONE, "blocks.0.norm1.weight": ONE, "mask_token": ONE, "decoder_pos_embed": ONE}
    tree["decoder_blocks.0.norm1.weight"] = ONE
    held = unwrap({"model": tree}, "mae.pth")
    assert list(held.arrays) == ["cls_token", "blocks.0.norm1.weight"]
    assert held.wrappers == ("model", "MAE's checkpoint")
    assert held.dropped == ("mask_token", "decoder_pos_embed", "decoder_blocks.0.norm1.weight")


def test_what_is_no_array_among_them_is_left_and_said():
    held = unwrap({"a.weight": ONE, "version": 2}, "net.pth")
    assert list(held.arrays) == ["a.weight"] and held.dropped == ("version",)
