"""vHeat's files, as its programs save them: read, folded, written back."""

import sys
import types

import numpy as np
import pytest
import safetensors.numpy
from safetensors.numpy import load_file

import qbheat_jax
from qbheat_jax import port
from qbheat_jax.errors import UserError
from qbheat_jax.models import registry
from qbheat_jax.models.vheat import VHeat
from qbheat_jax.port import files, tables
from tests import heat_nets

NETS = {"small_pre": "vheat_pre_scale", "small_post": "vheat_post_noscale", "small_dense": "vheat_dense"}
CLASSES = {"classes": 10}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for name, file in NETS.items():
        entry = registry.Entry(VHeat, heat_nets.fields(file)[0], registry.ENCODERS["vheat_t"].strides, registry._VHEAT)
        monkeypatch.setitem(registry.ENCODERS, name, entry)


def arrays_of(file):
    return load_file(heat_nets.DATA / f"{file}.state_dict.safetensors")


def known_of(file):
    known = load_file(heat_nets.DATA / f"{file}.activations.safetensors")
    return {name: array.transpose(0, 2, 3, 1) if array.ndim == 4 else array for name, array in known.items()}


def equal(left, right):
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


def logits(directory, images):
    return np.asarray(qbheat_jax.load(directory).logits(images, normalized=True))


def test_a_training_file_there_and_back_and_folded(tmp_path):
    arrays, known = arrays_of("vheat_pre_scale"), known_of("vheat_pre_scale")
    path = tmp_path / "net.safetensors"
    path.write_bytes(safetensors.numpy.save(arrays))
    port.port(path, "small_pre", tmp_path / "in", **CLASSES)
    model = qbheat_jax.load(tmp_path / "in")
    assert (model.config.image_size, model.config.encoder.grid, model.config.encoder.folded) == (32, 8, False)
    ours = logits(tmp_path / "in", known["input"])
    np.testing.assert_allclose(ours, known["logits"], rtol=0, atol=1e-5 * np.abs(known["logits"]).max())
    port.export(tmp_path / "in", tmp_path / "out.safetensors")
    assert equal(load_file(tmp_path / "out.safetensors"), arrays)

    facts = port.export(tmp_path / "in", tmp_path / "folded.safetensors", fold=True)
    folded = load_file(tmp_path / "folded.safetensors")
    assert facts["tensors"] == len(folded) == len(arrays) - 4 - 2 * 4 + 4
    for name, array in folded.items():
        if name.endswith("k_exp"):
            np.testing.assert_allclose(array, known[name], rtol=0, atol=1e-6)
        else:
            assert np.array_equal(array, arrays[name])
    port.port(tmp_path / "folded.safetensors", "small_pre", tmp_path / "short", **CLASSES)
    short = qbheat_jax.load(tmp_path / "short")
    assert (short.config.image_size, short.config.encoder.folded) == (32, True)
    error = 1e-6 * np.abs(ours).max()  # another program
    np.testing.assert_allclose(logits(tmp_path / "short", known["input"]), ours, rtol=0, atol=error)
    port.export(tmp_path / "short", tmp_path / "again.safetensors")
    assert equal(load_file(tmp_path / "again.safetensors"), folded)
    with pytest.raises(UserError):
        port.export(tmp_path / "short", tmp_path / "larger.safetensors", image_size=64)


def test_folding_another_encoder_is_refused(tmp_path):
    from tests.test_port_workdir import saved, state_dict

    port.port(saved(tmp_path / "net.safetensors", state_dict("micro")), "micro", tmp_path / "in", classes=10)
    with pytest.raises(UserError) as caught:
        port.export(tmp_path / "in", tmp_path / "out.safetensors", fold=True)
    assert "micro" in str(caught.value) and caught.value.exit_code == 2 and not (tmp_path / "out.safetensors").exists()


def test_another_image_size_resamples_the_embeddings(tmp_path):
    path = tmp_path / "net.safetensors"
    path.write_bytes(safetensors.numpy.save(arrays_of("vheat_pre_scale")))
    provenance = port.port(path, "small_pre", tmp_path / "in", image_size=64, **CLASSES)
    model = qbheat_jax.load(tmp_path / "in")
    params = model.encoder_variables["params"]
    assert (model.config.image_size, model.config.encoder.grid) == (64, 16) and provenance["resampled"]
    assert [params[f"freq_embed_{n}"].shape[0] for n in range(4)] == [16, 8, 4, 2]


@pytest.fixture
def node(monkeypatch):
    """A config node as the release's files hold one: a dict with attributes, of a package that is not here."""
    CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", types.ModuleType("yacs.config"))
    sys.modules["yacs.config"].CfgNode = CfgNode
    made = CfgNode(MODEL=CfgNode(TYPE="vHeat"), SEED=0)
    made.__dict__["__immutable__"] = True
    return made


@pytest.mark.parametrize(
    "wrapped, wrappers",
    [
        (lambda arrays: {"model": arrays, "model_ema": {k: v + 1 for k, v in arrays.items()}}, ["model"]),
        (lambda arrays: {"model": {f"module.{k}": v for k, v in arrays.items()}}, ["model", "module."]),
        (lambda arrays: {"model": arrays}, ["model"]),
    ],
    ids=["periodic", "best", "best of the average"],
)
def test_what_the_release_saves_beside_the_weights(tmp_path, node, wrapped, wrappers):
    torch = pytest.importorskip("torch")
    arrays = {name: torch.from_numpy(array) for name, array in arrays_of("vheat_post_noscale").items()}
    beside = {"optimizer": {"state": {0: {"step": torch.ones(())}}}, "epoch": 299, "max_accuracy": 82.2, "config": node}
    torch.save({**wrapped(arrays), **beside}, tmp_path / "net.pth")
    assert files.read(tmp_path / "net.pth")[0]["config"] == {"MODEL": {"TYPE": "vHeat"}, "SEED": 0}
    provenance = port.port(tmp_path / "net.pth", "small_post", tmp_path / "in", **CLASSES)
    assert provenance["wrappers"] == wrappers
    port.export(tmp_path / "in", tmp_path / "out.safetensors")
    assert equal(load_file(tmp_path / "out.safetensors"), {name: array.numpy() for name, array in arrays.items()})


def test_the_backbone_of_a_detector(tmp_path):
    torch = pytest.importorskip("torch")
    arrays, known = arrays_of("vheat_dense"), known_of("vheat_dense")
    tree = {**{name: torch.from_numpy(a) for name, a in arrays.items()}, "neck.lateral_convs.0.bias": torch.zeros(4)}
    torch.save({"state_dict": tree, "meta": {"epoch": 12}}, tmp_path / "net.pth")
    provenance = port.port(tmp_path / "net.pth", "small_dense", tmp_path / "in", head="drop")
    assert (
        provenance["wrappers"] == ["state_dict", "backbone."] and "neck.lateral_convs.0.bias" in provenance["dropped"]
    )
    model = qbheat_jax.load(tmp_path / "in")
    assert (model.config.image_size, model.config.encoder.outnorm) == (64, True)
    features = model.features(known["input.64x64"], normalized=True)
    np.testing.assert_allclose(features, known["out3.64x64"], rtol=0, atol=2e-4)
    port.export(tmp_path / "in", tmp_path / "out.safetensors")
    assert equal(
        load_file(tmp_path / "out.safetensors"), {name.removeprefix("backbone."): a for name, a in arrays.items()}
    )


def test_a_file_of_another_form_is_refused(tmp_path):
    path = tmp_path / "net.safetensors"
    path.write_bytes(safetensors.numpy.save(arrays_of("vheat_pre_scale")))
    for arch, name in (("small_post", "gamma1"), ("small_dense", "mlp")):
        with pytest.raises(UserError) as caught:
            port.port(path, arch, tmp_path / "in", **CLASSES)
        assert name in str(caught.value) and caught.value.exit_code == 2
    with pytest.raises(UserError):
        tables.of("vheat_t").options({"freq_embed.0": (56, 28, 96)})
