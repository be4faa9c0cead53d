"""What goes out: by PyTorch's names bit for bit, and as a program that runs without this package."""

import errno
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import qbheat_jax
from qbheat_jax import config as config_lib
from qbheat_jax import methods, port, pytree
from qbheat_jax.errors import RUN_FAILED, UserError
from qbheat_jax.train.checkpoint import Checkpoints
from tests.test_port_workdir import micro_vit, saved, state_dict  # noqa: F401


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A ported micro Mobile-Former with ten classes."""
    directory = tmp_path_factory.mktemp("export")
    arrays = state_dict("micro")
    port.port(saved(directory / "net.safetensors", arrays), "micro", directory / "run", classes=10, image_size=32)
    return directory / "run"


def run_of(config, directory):
    """A workdir as pre-training leaves it, at step 3."""
    batch = {
        "image": np.zeros((1, config.image_size, config.image_size, 3), np.uint8),
        "quarter": np.zeros(1, np.int32),
    }
    shapes = jax.eval_shape(lambda: methods.build(config).init(jax.random.key(0), batch))
    random = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: random.uniform(0.1, 1, leaf.shape).astype(np.float32), shapes)
    text = config_lib.to_json(config)
    checkpoints = Checkpoints(directory)
    checkpoints.save(3, {"step": np.array(3, np.int32), **variables, "opt_state": {}, "ema": {}}, 3, text)
    checkpoints.wait()
    checkpoints.close()
    (directory / "config.json").write_text(text)
    return directory


def equal(left, right):
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


IMAGES = np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)


def test_there_and_back_and_there_again(workdir, tmp_path):
    facts = port.export(workdir, tmp_path / "out" / "net.safetensors")
    there = load_file(tmp_path / "out" / "net.safetensors")
    assert equal(there, load_file(workdir.parent / "net.safetensors"))
    assert facts["tensors"] == len(there) and facts["encoder"] == "micro"
    with safe_open(tmp_path / "out" / "net.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt", "architecture": "micro", "image_size": "32"}
    port.export(workdir, tmp_path / "out" / "net.npz")
    with np.load(tmp_path / "out" / "net.npz") as arrays:
        assert equal(dict(arrays), there)
    for name in ("net.npz", "net.safetensors"):
        again = tmp_path / f"again-{name}"
        port.port(tmp_path / "out" / name, "micro", again, classes=10, image_size=32)
        before, after = (dict(pytree.names(qbheat_jax.load(path).variables)) for path in (workdir, again))
        assert equal(before, after)


def test_the_encoder_of_a_pretraining_run(small_config, tmp_path, monkeypatch):
    run = run_of(small_config({"encoder.name": "micro"}), tmp_path)
    port.export(run, tmp_path / "net.safetensors")
    names = set(load_file(tmp_path / "net.safetensors"))
    assert {"last.0.weight", "last.1.running_var", "tokens.weight"} <= names
    assert not any("heat" in name or "pixels" in name for name in names)
    port.port(tmp_path / "net.safetensors", "micro", tmp_path / "back", head="drop", image_size=32)
    model, back = qbheat_jax.load(run), qbheat_jax.load(tmp_path / "back")
    assert equal(*(dict(pytree.names(m.encoder_variables)) for m in (model, back)))
    assert "checkpoint 3" in (tmp_path / "README.md").read_text()
    assert "--head drop" in (tmp_path / "README.md").read_text()


def test_a_vits_fixed_position_code_goes_out_as_a_table(small_config, micro_vit, tmp_path):  # noqa: F811
    run = run_of(small_config({"encoder.name": "micro_vit", "encoder.stride": 8}), tmp_path)
    port.export(run, tmp_path / "net.safetensors")
    assert load_file(tmp_path / "net.safetensors")["pos_embed"].shape == (1, 16, 8)
    port.port(tmp_path / "net.safetensors", "micro_vit", tmp_path / "back", head="drop", stride=8)
    ours, back = (np.asarray(qbheat_jax.load(path).features(IMAGES)) for path in (run, tmp_path / "back"))
    np.testing.assert_allclose(ours, back, atol=1e-6)


ALONE = """
import sys
import numpy as np
from jax import export

images = np.load("images.npy")
for name in ("logits", "features"):
    model = export.deserialize(bytearray(open(f"{name}.stablehlo", "rb").read()))
    assert model.platforms == ("cpu", "cuda", "tpu")
    np.save(f"{name}.npy", np.asarray(model.call(images)))
    assert np.allclose(model.call(images[:1]), model.call(images)[:1], atol=1e-5)
assert not any(name.startswith(("qbheat", "flax")) for name in sys.modules)
"""


def test_stablehlo_runs_without_this_package(workdir, tmp_path):
    port.port(workdir.parent / "net.safetensors", "micro", tmp_path / "encoder", head="drop", image_size=32)
    models = {"logits": workdir, "features": tmp_path / "encoder"}
    for name, source in models.items():
        facts = port.export(source, tmp_path / f"{name}.stablehlo")
        assert facts["bytes"] == (tmp_path / f"{name}.stablehlo").stat().st_size
    np.save(tmp_path / "images.npy", IMAGES)
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for name, source in models.items():
        ours, theirs = np.asarray(getattr(qbheat_jax.load(source), name)(IMAGES)), np.load(tmp_path / f"{name}.npy")
        assert theirs.shape == ours.shape and theirs.dtype == np.float32
        np.testing.assert_allclose(theirs, ours, atol=1e-5 * np.abs(ours).max())
    assert "logits = model.call(images)" in (tmp_path / "README.md").read_text()
    assert "features = model.call(images)" in (tmp_path / "features.stablehlo.md").read_text()


def refused(*arguments, **options):
    with pytest.raises(UserError) as caught:
        port.export(*arguments, **options)
    return caught.value


def test_what_is_refused(workdir, tmp_path):
    assert "one of .safetensors, .npz, .stablehlo" in str(refused(workdir, tmp_path / "net.pth"))
    (tmp_path / "folder.npz").mkdir()
    assert "is a directory" in str(refused(workdir, tmp_path / "folder.npz"))
    target = tmp_path / "net.npz"
    target.write_text("mine")
    assert "exists: name another file, or pass --overwrite" in str(refused(workdir, target))
    assert target.read_text() == "mine"
    port.export(workdir, target, overwrite=True)
    assert np.load(target)["tokens.weight"].shape == (2, 8)
    assert "holds no run" in str(refused(tmp_path, tmp_path / "other.npz"))
    error = refused(workdir, target / "below.safetensors")
    assert "below.safetensors cannot be written" in str(error) and error.exit_code == RUN_FAILED


@pytest.mark.parametrize("name", ["net.npz", "net.safetensors"])
def test_a_full_disk_leaves_what_was_there(workdir, tmp_path, monkeypatch, name):
    (tmp_path / name).write_text("mine")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    error = refused(workdir, tmp_path / name, overwrite=True)
    assert str(error).endswith("cannot be written: No space left on device") and error.exit_code == RUN_FAILED
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"


def test_cards_stand_beside_the_weights_and_keep_their_licence(workdir, tmp_path):
    one, two = tmp_path / "one.npz", tmp_path / "two.npz"
    port.export(workdir, one)
    card = tmp_path / "README.md"
    text = card.read_text()
    assert text.startswith("# one.npz\n") and "PyTorch's" in text and "qbheat port --arch micro --from one.npz" in text
    assert (
        "--to DIR --classes 10 --image-size 32\n" in text
        and "--pixels" not in text
        and "net.safetensors" in text
        and "SHA-256" in text
    )
    card.write_text(
        text.replace("Licence: (to be filled in; the weights' own, which is not this package's)", "Licence: MIT")
    )
    port.export(workdir, one, overwrite=True)
    assert "\nLicence: MIT\n" in card.read_text()
    port.export(workdir, two)
    assert (tmp_path / "two.npz.md").read_text().startswith("# two.npz\n") and card.read_text().startswith(
        "# one.npz\n"
    )
