"""ONNX: what jax2onnx makes of a model is written only where ONNX Runtime computes the same; else the error says why."""

import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

import qbheat_jax
from qbheat_jax import config as config_lib
from qbheat_jax import methods, port
from qbheat_jax.errors import BAD_INPUT, UserError
from qbheat_jax.train.checkpoint import Checkpoints
from tests.test_port_export import IMAGES, run_of


@pytest.fixture
def workdir(small_config, tmp_path):
    return run_of(small_config(), tmp_path / "run")


class Session:
    """Stands in for ONNX Runtime: runs the traced function, and adds `error` times the largest output."""

    error, function = 0.0, None

    def __init__(self, data, options, providers):
        assert data == b"program" and options.log_severity_level == 3 and providers == ["CPUExecutionProvider"]

    def run(self, outputs, inputs):
        assert outputs is None
        got = np.asarray(type(self).function(inputs["images"]))
        return [got + self.error * np.abs(got).max()]


@pytest.fixture
def libraries(monkeypatch):
    """Stand-ins for both libraries, with the signatures that are used of them."""

    def to_onnx(fn, inputs, *, input_names, output_names):
        (images,) = inputs
        assert str(images.shape[0]) == "batch" and images.shape[1:] == IMAGES.shape[1:] and images.dtype == np.uint8
        traced = jax.make_jaxpr(fn)(jax.ShapeDtypeStruct((3, *images.shape[1:]), np.uint8))
        assert "platform_index" not in str(traced)
        Session.function = staticmethod(fn)
        return types.SimpleNamespace(SerializeToString=lambda: b"program")

    fakes = {
        "jax2onnx": types.SimpleNamespace(to_onnx=to_onnx),
        "onnxruntime": types.SimpleNamespace(InferenceSession=Session, SessionOptions=types.SimpleNamespace),
    }
    for name, module in fakes.items():
        monkeypatch.setitem(sys.modules, name, module)
    return fakes


def refused(workdir, target):
    with pytest.raises(UserError) as caught:
        port.export(workdir, target)
    assert caught.value.exit_code == BAD_INPUT and not target.exists()
    return str(caught.value)


def test_a_program_that_computes_the_same_is_written(workdir, libraries, tmp_path):
    facts = port.export(workdir, tmp_path / "net.onnx")
    assert (tmp_path / "net.onnx").read_bytes() == b"program" and facts["bytes"] == 7
    assert 'model.run(None, {"images": images})' in Path(facts["card"]).read_text()


def test_a_program_that_computes_something_else_is_refused(workdir, libraries, tmp_path, monkeypatch):
    monkeypatch.setattr(Session, "error", 2e-4)
    message = refused(workdir, tmp_path / "net.onnx")
    assert "'pebble'" in message and "2.0e-04" in message


def test_an_encoder_that_is_not_converted_is_refused(workdir, libraries, tmp_path):
    def fails(*_, **__):
        raise NotImplementedError("no plugin for primitive 'wave'\nmore")

    libraries["jax2onnx"].to_onnx = fails
    message = refused(workdir, tmp_path / "net.onnx")
    assert "'pebble'" in message and "primitive 'wave'" in message and "more" not in message


def test_missing_libraries_are_named(workdir, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    assert "qbheat_jax[onnx]" in refused(workdir, tmp_path / "net.onnx")


# Of each family of encoders of images.
CONVERTED = (
    "vit_ti", "mobilenet_v2", "efficientnet_lite0", "resnet18", "mobile_former_tiny", "vheat_nano", "hcnet_nano",
)  # fmt: skip


def new_run(config, directory):
    """A workdir with the weights that a run starts from."""
    batch = {"image": np.zeros((1, config.image_size, config.image_size, 3), np.uint8)}
    variables = jax.device_get(jax.jit(methods.build(config).init)(jax.random.key(0), batch))
    text = config_lib.to_json(config)
    checkpoints = Checkpoints(directory)
    checkpoints.save(1, {"step": np.array(1, np.int32), **variables, "opt_state": {}, "ema": {}}, 1, text)
    checkpoints.close()
    (directory / "config.json").write_text(text)
    return directory


@pytest.mark.weekly
@pytest.mark.parametrize("name", CONVERTED)
def test_encoders_and_classifiers_are_converted(name, small_config, tmp_path):
    """By the libraries themselves, which are not part of the extra `test`: jax2onnx needs an older orbax."""
    pytest.importorskip("jax2onnx", reason="the extra onnx is not installed")
    onnxruntime = pytest.importorskip("onnxruntime")
    fields = {"encoder.name": name, "objective": "supervised", "head.classes": 5, "image_size": 64}
    run = new_run(small_config(fields), tmp_path / "run")
    port.export(run, tmp_path / "net.onnx")
    images = np.random.default_rng(2).integers(0, 256, (2, 64, 64, 3), np.uint8)
    (logits,) = onnxruntime.InferenceSession(tmp_path / "net.onnx").run(None, {"images": images})
    expected = np.asarray(qbheat_jax.load(run).logits(images))
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())
