"""A ported workdir: what is in it, what is refused, and that porting twice changes nothing."""

import json
import logging

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import qbheat_jax
from qbheat_jax import config as config_lib
from qbheat_jax import port, pytree
from qbheat_jax.errors import RUN_FAILED, UserError
from qbheat_jax.models import registry
from qbheat_jax.models.resnet import ResNet
from qbheat_jax.models.vit import ViT
from qbheat_jax.port import names, shapes, tables
from qbheat_jax.train import config_tables

RANDOM = np.random.default_rng(0)


def state_dict(arch, classes=10, **fields):
    """{PyTorch's name: random array} of a whole file."""
    given = {"encoder.name": arch, "head.classes": classes, "image_size": 32, **fields}
    leaves = shapes.of(config_lib.resolve(given, config_tables.CLASSIFIER))
    named = tables.of(arch).torch_names(leaves)
    return {
        named[path]: RANDOM.uniform(0.1, 1, names.torch_shape(path, shape)).astype(np.float32)
        for path, shape in leaves.items()
    }


def saved(path, arrays):
    path.write_bytes(safetensors.numpy.save({name: np.ascontiguousarray(a) for name, a in arrays.items()}))
    return path


@pytest.fixture(scope="module")
def micro():
    return state_dict("micro")


@pytest.fixture
def micro_vit(monkeypatch):
    """A ViT small enough for a test: patches of 16 or 8."""
    strides = {16: {"patch": 16}, 8: {"patch": 8}}
    entry = registry.Entry(ViT, {"width": 8, "heads": 2, "depth": 1}, strides, ("class_token", "position", "grid"))
    monkeypatch.setitem(registry.ENCODERS, "micro_vit", entry)
    return {"encoder.class_token": True, "encoder.position": "learnt", "encoder.grid": 2}


def ported(tmp_path, arrays, arch="micro", to="to", **options):
    return port.port(saved(tmp_path / "net.safetensors", arrays), arch, tmp_path / to, **options)


def refused(tmp_path, arrays, arch="micro", to="to", **options):
    with pytest.raises(UserError) as caught:
        ported(tmp_path, arrays, arch, to, **options)
    return str(caught.value)


def test_everything_is_in_the_workdir(tmp_path, micro):
    arrays = {**micro, "stem.1.num_batches_tracked": np.array(7)}
    provenance = ported(tmp_path, arrays, classes=10, image_size=48)
    workdir = tmp_path / "to"
    assert sorted(path.name for path in workdir.iterdir()) == [
        "README.md",
        "checkpoints",
        "config.json",
        "provenance.json",
    ]

    model = qbheat_jax.load(workdir)
    assert model.config.objective == "classifier" and model.config.encoder.name == "micro"
    assert model.config.image_size == 48 and model.config.head.classes == 10 and model.class_names is None
    table, found = tables.of("micro"), dict(pytree.names(model.variables))
    for path, name in table.torch_names(found).items():
        assert np.array_equal(names.to_torch(path, np.asarray(found[path])), micro[name]), name
    logits = model.logits(np.zeros((2, 48, 48, 3), np.uint8))
    assert logits.shape == (2, 10) and np.isfinite(logits).all()

    assert json.loads((workdir / "provenance.json").read_text()) == provenance
    assert provenance["renamed"]["features.1.hyper1.hyper.0.weight"] == "params/encoder/features_1/hyper1/fc0/kernel"
    assert len(provenance["renamed"]) == len(micro) and provenance["ignored"] == ["stem.1.num_batches_tracked"]
    assert provenance["source"] == "net.safetensors" and len(provenance["sha256"]) == 64
    assert provenance["format"] == "safetensors" and provenance["arch"] == "micro" and provenance["dropped"] == []
    assert str(tmp_path) not in (workdir / "provenance.json").read_text()

    card = (workdir / "README.md").read_text()
    for words in (
        "`micro`",
        "10 classes",
        "48 x 48 pixels",
        "red 0.485",
        provenance["sha256"],
        "Licence: ",
        "load('to')",
    ):
        assert words in card


def test_a_thousand_classes_are_named(tmp_path):
    ported(tmp_path, state_dict("micro", 1000))
    assert qbheat_jax.load(tmp_path / "to").class_names[0] == "tench"


def test_types_become_float32(tmp_path, micro, caplog):
    caplog.set_level(logging.INFO)
    halves = {name: array.astype(ml_dtypes.bfloat16 if "stem" in name else np.float16) for name, array in micro.items()}
    provenance = ported(tmp_path, halves, classes=10)
    assert provenance["stored_as"] == "bfloat16, float16"
    assert "stored as bfloat16, float16 are kept exactly, as float32" in caplog.text
    model = qbheat_jax.load(tmp_path / "to")
    assert {str(leaf.dtype) for _, leaf in pytree.names(model.variables)} == {"float32"}
    kernel = model.variables["params"]["encoder"]["stem"]["conv"]["kernel"]
    assert np.array_equal(np.transpose(kernel, (3, 2, 0, 1)), halves["stem.0.weight"].astype(np.float32))
    ported(tmp_path, {**micro, "tokens.weight": micro["tokens.weight"].astype(np.float64)}, to="double", classes=10)
    assert "rounded to float32" in caplog.text


def test_numbers_that_are_no_weights(tmp_path, micro):
    name = "classifier.classifier.1.bias"
    message = refused(tmp_path, {**micro, name: np.arange(10)}, classes=10)
    assert f"{name} is stored as int64" in message
    message = refused(tmp_path, {**micro, name: np.full(10, np.nan, np.float32)}, classes=10)
    assert f"{name} holds numbers that are not finite" in message
    assert not (tmp_path / "to").exists()


def test_a_dropped_head_is_reported(tmp_path, micro):
    provenance = ported(tmp_path, micro, head="drop")
    assert sorted(provenance["dropped"]) == ["classifier.classifier.1.bias", "classifier.classifier.1.weight"]
    model = qbheat_jax.load(tmp_path / "to")
    assert set(model.variables["params"]) == {"encoder"} and model.config.head.classes == 0
    with pytest.raises(UserError, match="no classifier"):
        model.logits(np.zeros((1, 32, 32, 3), np.uint8))


def test_wrong_files_and_options_write_nothing(tmp_path, micro):
    message = refused(tmp_path, micro)
    assert "the head has 10 classes, the config 1,000: pass --head drop, or --classes 10" in message
    assert "--arch resnet101: there is no table" in refused(tmp_path, micro, "resnet101")
    assert "--head off: it takes keep, drop" in refused(tmp_path, micro, head="off")
    assert "--pixels grey: it takes imagenet, half, lite" in refused(tmp_path, micro, pixels="grey")
    assert "encoder micro has no stride 16" in refused(tmp_path, micro, stride=16)
    assert "--key ema: " in refused(tmp_path, micro, key="ema")
    assert "image_size=30 is not accepted" in refused(tmp_path, micro, image_size=30, classes=10)
    assert not (tmp_path / "to").exists()


def test_the_same_port_again_changes_nothing_and_another_is_refused(tmp_path, micro, caplog):
    caplog.set_level(logging.INFO)
    first = ported(tmp_path, micro, classes=10)
    card = tmp_path / "to" / "README.md"
    card.write_text(card.read_text().replace("(to be filled in", "MIT (filled in"))
    assert ported(tmp_path, micro, classes=10) == first
    assert "holds this port already" in caplog.text and "MIT" in card.read_text()
    assert "holds the port of another file or with other options (net.safetensors, micro)" in refused(
        tmp_path, micro, head="drop"
    )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert "already holds something: name a new or empty directory" in refused(tmp_path, micro, to="mine", classes=10)
    assert "is a file: name a directory" in refused(tmp_path, micro, to="net.safetensors", classes=10)


def test_an_interrupted_port_is_done_again(tmp_path, micro):
    ported(tmp_path, micro, classes=10)
    workdir = tmp_path / "to"
    (workdir / "config.json").unlink()
    (workdir / "checkpoints" / "0" / "_CHECKPOINT_METADATA").unlink()
    ported(tmp_path, micro, classes=10)
    assert qbheat_jax.load(workdir).config.head.classes == 10


def test_a_place_that_cannot_be_written(tmp_path, micro):
    with pytest.raises(UserError, match="cannot be written") as caught:
        ported(tmp_path, micro, to="net.safetensors/below", classes=10)
    assert caught.value.exit_code == RUN_FAILED


def test_wrappers_and_mae_are_in_the_provenance(tmp_path, micro_vit):
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(array) for name, array in state_dict("micro_vit", 0, **micro_vit).items()}
    mae = {**tensors, "mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 8)}
    torch.save({"model": {f"module.{name}": tensor for name, tensor in mae.items()}, "epoch": 1}, tmp_path / "mae.pth")
    with pytest.raises(UserError, match="there is no classifier in it: pass --head drop"):
        port.port(tmp_path / "mae.pth", "micro_vit", tmp_path / "to")
    provenance = port.port(tmp_path / "mae.pth", "micro_vit", tmp_path / "to", head="drop", pixels="half")
    assert provenance["wrappers"] == ["model", "module.", "MAE's checkpoint"] and provenance["key"] == "model"
    assert provenance["dropped"] == ["mask_token", "decoder_embed.weight"]
    model = qbheat_jax.load(tmp_path / "to")
    assert model.config.image_size == 32 and model.config.encoder.grid == 2 and model.config.pixels == "half"
    assert model.features(np.zeros((1, 32, 32, 3), np.uint8)).shape == (1, 2, 2, 8)


def test_mocos_query_encoder_is_ported(tmp_path, monkeypatch):
    entry = registry.Entry(ResNet, {"blocks": (1, 1, 1, 1), "bottleneck": False}, {32: {}})
    monkeypatch.setitem(registry.ENCODERS, "micro_resnet", entry)
    encoder = state_dict("micro_resnet", 0)
    moco = {f"module.encoder_q.{name}": array for name, array in encoder.items()}
    moco |= {"module.encoder_q.fc.0.weight": np.ones((512, 512)), "module.encoder_q.fc.2.weight": np.ones((128, 512))}
    moco |= {
        "module.encoder_k.conv1.weight": np.zeros(1),
        "module.queue": np.zeros((128, 4)),
        "module.queue_ptr": np.zeros(1),
    }
    np.savez(tmp_path / "moco.npz", **moco)
    with pytest.raises(UserError, match=r"projection of a pre-training method \(fc.0 and fc.2\).*pass --head drop"):
        port.port(tmp_path / "moco.npz", "micro_resnet", tmp_path / "to")
    provenance = port.port(tmp_path / "moco.npz", "micro_resnet", tmp_path / "to", head="drop")
    assert provenance["wrappers"] == ["module.", "MoCo's encoder_q."] and provenance["names"] == "usual"
    assert set(provenance["dropped"]) == {"encoder_k.conv1.weight", "queue", "queue_ptr", "fc.0.weight", "fc.2.weight"}
    kernel = qbheat_jax.load(tmp_path / "to").variables["params"]["encoder"]["conv1"]["kernel"]
    assert np.array_equal(np.transpose(kernel, (3, 2, 0, 1)), encoder["conv1.weight"])


def test_a_position_code_is_resampled_for_another_size(tmp_path, micro_vit, caplog):
    caplog.set_level(logging.INFO)
    arrays = state_dict("micro_vit", **micro_vit)
    provenance = ported(tmp_path, arrays, "micro_vit", classes=10, image_size=80)
    assert "2 x 2 cells resampled to 5 x 5 for images of 80 pixels" in caplog.text
    assert (
        provenance["resampled"] in caplog.text
        and provenance["resampled"] in (tmp_path / "to" / "README.md").read_text()
    )
    model = qbheat_jax.load(tmp_path / "to")
    assert model.config.image_size == 80 and model.config.encoder.grid == 5
    ours = model.variables["params"]["encoder"]["pos_embed"]
    assert ours.shape == (1, 26, 8) and np.array_equal(ours[:, 0], arrays["pos_embed"][:, 0])
    assert model.logits(np.zeros((1, 80, 80, 3), np.uint8)).shape == (1, 10)

    torch = pytest.importorskip("torch")
    grid = torch.from_numpy(arrays["pos_embed"][:, 1:]).reshape(1, 2, 2, 8).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(5, 5), mode="bicubic", antialias=True, align_corners=False)
    np.testing.assert_allclose(ours[:, 1:], grid.permute(0, 2, 3, 1).reshape(1, 25, 8), atol=1e-5)
