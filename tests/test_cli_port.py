"""Commands on weights: port, classify and export, and a ported checkpoint as --init of probe and pretrain."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from qbheat_jax import api
from tests.test_api import make_workdir
from tests.test_cli import CONFIGS, qbheat, refused


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Write the random weights of a small Mobile-Former under PyTorch's names, and return the file."""
    from qbheat_jax import port

    folder = tmp_path_factory.mktemp("weights")
    workdir, _ = make_workdir(folder / "made", {"encoder.name": "former_micro", "head.classes": 3})
    port.export(workdir, folder / "former_micro.npz")
    return folder / "former_micro.npz"


@pytest.fixture(scope="module")
def ported(weights):
    from qbheat_jax import port

    port.port(weights, "former_micro", weights.parent / "ported", classes=3, image_size=64)
    return weights.parent / "ported"


def test_port_then_export_gives_every_bit_back(capsys, weights, tmp_path):
    arguments = ("--arch", "former_micro", "--from", weights, "--classes", 3, "--image-size", 64)
    code, out, err = qbheat(capsys, "port", *arguments, "--to", tmp_path / "ported")
    assert code == 0 and out.strip() == str(tmp_path / "ported"), err
    code, _, err = qbheat(capsys, "export", "--from", tmp_path / "ported", "--to", tmp_path / "again.npz")
    assert code == 0, err
    before, after = np.load(weights), np.load(tmp_path / "again.npz")
    assert set(before.files) == set(after.files)
    for name in before.files:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)


def test_classify_images_and_a_labelled_folder(capsys, ported, tmp_path):
    generator = np.random.default_rng(0)
    for name in "012":
        (tmp_path / "val" / name).mkdir(parents=True)
        for k in range(2):
            pixels = generator.integers(0, 256, (70, 80, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "val" / name / f"{k}.png")
    (tmp_path / "broken.jpg").write_text("no image")
    files = sorted((tmp_path / "val").rglob("*.png"))
    code, out, err = qbheat(capsys, "classify", "--init", ported, *files, tmp_path / "broken.jpg", "--top", 2)
    assert code == 0 and out.count("%") == 2 * len(files), err
    said = [line.split("class ")[1] for line in out.splitlines() if "%" in line][::2]
    run = tmp_path / "run"
    code, out, err = qbheat(capsys, "classify", "--init", ported, "--data", f"folder:{tmp_path}", "--workdir", run)
    result = json.loads(out)
    assert code == 0 and result == json.loads((run / "result.json").read_text()), err
    assert result["n"] == 6 and result["top5"] == 1.0
    assert result["top1"] == np.mean([label == file.parent.name for label, file in zip(said, files)])


def test_mistakes(capsys, weights, ported, tmp_path):
    to = ("--to", tmp_path / "x")
    for arguments in ((), ("a.png", "--data", "photos")):
        error = refused(capsys, "classify", "--init", ported, *arguments)
        assert "IMAGE" in error and "--data" in error
    error = refused(capsys, "classify", "--init", ported, "a.png", "--split", "val")
    assert "--split" in error and "--data" in error
    assert "--config.seed" in refused(
        capsys, "port", "--arch", "former_micro", "--from", weights, *to, "--config.seed", 1
    )
    error = refused(capsys, "port", "--arch", "former_micro", "--from", weights, *to, "--classes", "many")
    assert "--classes" in error and "'many'" in error
    error = refused(capsys, "port", "--arch", "resnet50", "--from", weights, *to, "--classes", 3)
    assert "former_micro" in error and "resnet50" in error
    assert not (tmp_path / "x").exists()


def test_a_ported_checkpoint_is_probed_and_pre_trained_from(capsys, one_device, ported, small_config_file, tmp_path):
    small = ("--config.image_size", 32, "--config.data.source", "synthetic:64")
    code, out, err = qbheat(
        capsys,
        "probe",
        "--config",
        CONFIGS / "photos_lin.py",
        "--init",
        ported,
        "--workdir",
        tmp_path / "lin",
        *small,
    )
    assert code == 0 and json.loads((tmp_path / "lin" / "result.json").read_text())["encoder"] == "former_micro", err
    arguments = ("pretrain", "--config", small_config_file, "--init", ported, "--workdir", tmp_path / "run")
    error = refused(capsys, *arguments)
    assert "encoder.name='former_micro'" in error and "'pebble'" in error
    fields = ("--config.encoder.name", "former_micro", "--config.image_size", 64, "--config.total_steps", 2,
              "--config.quarter.placements", "corners")  # fmt: skip
    code, out, err = qbheat(capsys, *arguments, *fields)
    assert code == 0 and api.load(tmp_path / "run").config.init == str(ported), err
    # A workdir of ported weights is neither trained in nor reported on.
    assert "config" in refused(capsys, *arguments[:-1], ported, *fields)
    assert str(ported) in refused(capsys, "report", "--workdir", ported)


def test_every_command_refuses_a_workdir_whose_config_was_edited(capsys, ported, small_config_file, tmp_path):
    workdir, new = shutil.copytree(ported, tmp_path / "edited"), ("--workdir", tmp_path / "new")
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(config | {"image_size": 32}))
    (tmp_path / "image.png").write_bytes(b"")
    for command in (
        ("export", "--from", workdir, "--to", tmp_path / "net.npz"),
        ("classify", "--init", workdir, tmp_path / "image.png"),
        (
            "probe",
            "--config",
            CONFIGS / "photos_lin.py",
            "--init",
            workdir,
            *new,
            "--config.data.source",
            "synthetic:64",
        ),
        ("finetune", "--config", CONFIGS / "photos_finetune.py", "--init", workdir, *new),
        ("detect", "--config", CONFIGS / "detect" / "scenes.py", "--init", workdir, *new),
        ("pretrain", "--config", small_config_file, "--init", workdir, *new),
        ("analyse", "--init", workdir, *new, "--data", "synthetic:64"),
        ("report", "--workdir", workdir),
    ):
        error = refused(capsys, *command)
        assert "image_size=32" in error and "image_size=64" in error, command
    assert not (tmp_path / "net.npz").exists()


def test_a_prefix_is_taken_off_and_given(capsys, weights, tmp_path):
    arrays = dict(np.load(weights))
    both = {f"teacher.{name}": array for name, array in arrays.items()}
    both |= {f"student.{name}": array + 1 for name, array in arrays.items()}
    np.savez(tmp_path / "both.npz", **both)
    port = ("port", "--arch", "former_micro", "--from", tmp_path / "both.npz", "--classes", 3)
    for name, prefix, more in (("teacher", (), 0), ("student", ("--prefix", "student."), 1)):
        code, _, err = qbheat(capsys, *port, "--to", tmp_path / name, *prefix)
        assert code == 0, err
        provenance = json.loads((tmp_path / name / "provenance.json").read_text())
        assert provenance["wrappers"] == [f"{name}."] and len(provenance["dropped"]) == len(arrays)
        kernel = api.load(tmp_path / name).variables["params"]["encoder"]["stem"]["conv"]["kernel"]
        np.testing.assert_array_equal(kernel, arrays["stem.0.weight"].transpose(2, 3, 1, 0) + more)
    error = refused(capsys, *port, "--to", tmp_path / "x", "--prefix", "trunk.")
    assert "--prefix" in error and "trunk." in error
