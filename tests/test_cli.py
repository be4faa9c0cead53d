"""Command line: a one-step run of every command with its real config, and a one-line error for every mistake."""

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qbheat_jax import cli
from qbheat_jax.errors import UserError
from qbheat_jax.report import sample
from qbheat_jax.train import metrics, runtime

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"


def qbheat(capsys, *argv):
    """Run a command and return (exit code, stdout, stderr)."""
    code = cli.main([str(a) for a in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def refused(capsys, *argv, code=2):
    """Run a command that must fail with exit code `code` and one error line, and return that line."""
    got, out, err = qbheat(capsys, *argv)
    lines = [line for line in err.splitlines() if line.startswith("qbheat: error: ")]
    assert got == code and out == "" and len(lines) == 1 and "Traceback" not in err
    return lines[0].removeprefix("qbheat: error: ")


@pytest.mark.slow
def test_the_quickstart_in_one_step_each(tmp_path, capsys, one_device, monkeypatch):
    """Run the quickstart's commands and configs with a small encoder, one step or epoch, and few images."""
    monkeypatch.setattr(sample, "POOL", 8)
    run = tmp_path / "run"
    one = ("--config.total_steps", 1, "--config.warmup", 0, "--config.batch_size", 16, "--config.data.eval_split=",
           "--config.encoder.name", "pebble")  # fmt: skip
    code, out, err = qbheat(capsys, "pretrain", "--config", CONFIGS / "photos.py", "--workdir", run, *one)
    assert code == 0 and json.loads(out)["step"] == 1, err
    assert np.isfinite(metrics.read(run)[0]["train/loss"])
    assert list(run.glob("events.out.tfevents*")), "TensorBoard is written where tensorflow is"

    recipes = (CONFIGS / "photos_lin.py", CONFIGS / "photos_tran1.py")
    short = ("--config.total_epochs", 1, "--config.learning_rates", "(0.1,)", "--config.weight_decays", "(0.1,)",
             "--config.warmup_epochs", 0, "--config.data.fraction", 0.1)  # fmt: skip
    code, out, err = qbheat(
        capsys, "probe", "--config", *recipes, "--init", run, "histogram", "--workdir", run / "probe", *short
    )
    assert code == 0, err
    for name in ("lin-10pct-run", "tran-1-10pct-run", "lin-10pct-histogram"):
        result = json.loads((run / "probe" / name / "result.json").read_text())
        assert result["n"] == 1000 and f"{result['top1']:.3f}" in out
    assert not (run / "probe" / "tran-1-10pct-histogram").exists()

    code, out, err = qbheat(capsys, "report", "--workdir", run)
    page = Path(out.strip())
    assert code == 0 and page == run / "report" / "index.html", err
    assert page.read_text().count("<img") > 20

    code, out, _ = qbheat(capsys, "doctor")
    assert code == 0 and "jax" in out and "cpu" in out


def test_python_m_is_the_same_command():
    got = subprocess.run([sys.executable, "-m", "qbheat_jax", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert got.returncode == 0 and re.fullmatch(r"qbheat_jax \d+\.\d+\.\d+\n", got.stdout)


RESTARTED = """
import os, sys
from qbheat_jax.train import runtime
runtime.vendors = lambda: set(sys.argv[2:])
print("started", os.getpid(), flush=True)
runtime.tune_malloc()
print(os.environ.get(runtime.TUNABLES), *sys.argv[1:], *sys.warnoptions)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="options of glibc")
def test_a_process_starts_anew_to_tune_malloc_once():
    def lines(*vendors, **environment):
        kept = {name: value for name, value in os.environ.items() if name != runtime.TUNABLES}
        command = [sys.executable, "-W", "ignore::UserWarning", "-c", RESTARTED, "two words", *vendors]
        got = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**kept, **environment})
        assert got.returncode == 0, got.stderr
        return got.stdout.splitlines()

    first, second, last = lines("0x8086")
    assert first == second, "under the same number"
    chosen, words = last.split(" ", 1)
    assert words == "two words 0x8086 ignore::UserWarning"
    assert chosen.split(":") == [f"glibc.malloc.{name}={value}" for name, value in runtime.MALLOC.items()]
    for chosen, vendors, environment in (("None", [runtime.NVIDIA], {}), ("", [], {runtime.TUNABLES: ""})):
        _, last = lines(*vendors, **environment)
        assert last == " ".join([chosen, "two words", *vendors, "ignore::UserWarning"])


BLOCKED = """
import sys
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec


def without_tensorflow(name, path=None, target=None):
    if name.split(".")[0] in ("tensorflow", "tensorflow_datasets", "clu", "tensorboard", "keras"):
        return None  # not installed
    return find_spec(name, path, target)


PathFinder.find_spec = without_tensorflow
from tests import conftest
from qbheat_jax import cli
sys.exit(cli.main(sys.argv[1:]))
"""


def test_pretraining_on_synthetic_needs_no_tensorflow(tmp_path, small_config_file):
    got = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:qbheat_jax", "-c", BLOCKED, "pretrain", "--config",
         str(small_config_file), "--workdir", str(tmp_path / "run"), "--config.total_steps", "1", "--config.warmup", "0"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert got.returncode == 0, got.stderr
    assert json.loads(got.stdout)["step"] == 1
    assert "tensorflow is not loaded: metrics go to" in got.stderr
    assert "Traceback" not in got.stderr and "DeprecationWarning" not in got.stderr
    photos = subprocess.run(
        [sys.executable, "-c", BLOCKED, "pretrain", "--config", str(small_config_file), "--workdir",
         str(tmp_path / "other"), "--config.data.source", "photos"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert photos.returncode == 2
    assert "data.source='photos'" in photos.stderr and "tensorflow" in photos.stderr
    assert "Traceback" not in photos.stderr


def test_overrides():
    rest, overrides = cli.split_overrides(
        ["a", "--config", "f.py", "--config.x.y", "1", "--config.z=(1, 2)", "--w", "d"]
    )
    assert rest == ["a", "--config", "f.py", "--w", "d"]
    assert overrides == [("x.y", "1"), ("z", "(1, 2)")]
    with pytest.raises(UserError, match=r"--config\.x"):
        cli.split_overrides(["--config.x"])


def photo(size=(40, 40), mode="RGB", seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture
def folder(tmp_path):
    """Make a labelled folder of images: two classes in train and test."""
    for split, count in (("train", 20), ("test", 4)):
        for label in ("ant", "bee"):
            place = tmp_path / "images" / split / label
            place.mkdir(parents=True)
            for n in range(count):
                photo(seed=n).save(place / f"{n}.png")
    return tmp_path / "images"


def train(capsys, config_file, workdir, *more, code=2):
    return refused(capsys, "pretrain", "--config", config_file, "--workdir", workdir, *more, code=code)


def test_mistakes_in_arguments(capsys, tmp_path, small_config_file):
    assert "'nonsense'" in refused(capsys, "nonsense")
    assert "--workdir" in refused(capsys, "pretrain", "--config", small_config_file)
    assert "none.py" in refused(capsys, "pretrain", "--config", "none.py", "--workdir", tmp_path)
    for field, value, words in (
        ("batchsize", 8, ("batchsize", "batch_size")),
        ("batch_size", "many", ("batch_size", "'many'")),
        ("image_size", 36, ("image_size=36", "pebble", "stride", "8")),
        ("image_size", 48, ("image_size=48", "middle")),
        ("encoder.name", "mobile", ("'mobile'", "mobilenet_v2")),
        ("encoder.stride", 3, ("stride", "3")),
        ("mesh.data", 3, ("mesh.data=3", "mesh.fsdp=1", "mesh.model=1", "8 devices")),
        ("batch_size", 12, ("batch_size=12", "8 devices")),
        ("warmup", 9, ("warmup", "9", "6")),
    ):
        message = train(capsys, small_config_file, tmp_path / "w", f"--config.{field}", value)
        assert all(word in message for word in words), message
    assert not (tmp_path / "w" / "checkpoints").exists() or not list((tmp_path / "w" / "checkpoints").iterdir())


def test_mistakes_in_data(capsys, tmp_path, small_config_file, folder):
    def error(source, *more):
        return train(capsys, small_config_file, tmp_path / "w", "--config.data.source", source, *more)

    assert "nowhere" in error("folder:nowhere")
    assert "photographs" in error("photographs")
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in error(f"folder:{tmp_path / 'empty'}")
    message = error(f"folder:{folder}", "--config.batch_size", 64)
    assert "40" in message and "train" in message and "batch_size=64" in message
    assert "data.split='dev'" in error(f"folder:{folder}", "--config.data.split", "dev")
    (folder / "train" / "cow").mkdir()
    assert "cow" in error(f"folder:{folder}")


def test_labels_that_differ_between_train_and_test(capsys, tmp_path, folder):
    (folder / "test" / "bee").rename(folder / "test" / "wasp")
    message = refused(
        capsys, "probe", "--config", CONFIGS / "photos_lin.py", "--init", "histogram", "--workdir", tmp_path / "w",
        "--config.data.source", f"folder:{folder}",
    )  # fmt: skip
    assert "bee" in message and "wasp" in message


def test_two_probes_never_share_a_folder(capsys, tmp_path):
    arguments = ("--config", CONFIGS / "photos_lin.py", "--workdir", tmp_path / "w")
    message = refused(capsys, "probe", *arguments, "--init", tmp_path / "a" / "run", tmp_path / "b" / "run")
    assert "--workdir" in message and str(tmp_path / "w" / "lin-run") in message


def mixed_bag(place):
    """Write 26 images in the modes and formats that cameras, scanners and the web produce."""
    place.mkdir(parents=True)
    modes = {"L": "png", "P": "png", "RGBA": "png", "CMYK": "jpg", "1": "png", "LA": "png", "RGB": "webp"}
    for n in range(24):
        mode, extension = list(modes.items())[n % len(modes)]
        photo((70 - n, 40 + n), mode, n).save(place / f"{n:02}.{extension}")
    Image.fromarray((np.arange(60 * 50, dtype=np.uint16) * 20).reshape(60, 50)).save(place / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo((80, 50), "RGB", 99).save(place / "turned.jpg", exif=exif)


def test_a_mixed_bag_with_corrupt_files_trains(one_device, capsys, tmp_path, small_config_file, caplog):
    bag = tmp_path / "bag"
    mixed_bag(bag)
    whole = (bag / "turned.jpg").read_bytes()
    (bag / "torn.jpg").write_bytes(whole[: len(whole) // 2])
    (bag / "noise.png").write_bytes(b"this is no picture")
    arguments = (
        "pretrain",
        "--config",
        small_config_file,
        "--config.data.source",
        f"folder:{bag}",
        "--config.log_every",
        1,
    )
    code, out, err = qbheat(capsys, *arguments, "--workdir", tmp_path / "w", "--config.data.max_bad_fraction", 0.2)
    assert code == 0, err
    assert json.loads(out)["skipped_files"] == 2
    assert "torn.jpg" in caplog.text and "noise.png" in caplog.text
    assert all(np.isfinite(line["train/loss"]) for line in metrics.read(tmp_path / "w") if "train/loss" in line)

    message = refused(capsys, *arguments, "--workdir", tmp_path / "v", code=1)
    assert "data.max_bad_fraction=0.01" in message and "28" in message


def test_tfds_with_mocked_data(one_device, capsys, tmp_path, small_config_file):
    tfds = pytest.importorskip("tensorflow_datasets")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tfds.testing.mock_data(num_examples=40):
        code, out, err = qbheat(
            capsys, "pretrain", "--config", small_config_file, "--workdir", tmp_path / "w",
            "--config.data.source", "tfds:cifar10", "--config.total_steps", 3, "--config.images_every", 2,
        )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["step"] == 3
    board = EventAccumulator(str(tmp_path / "w"), {"tensors": 0}).Reload()
    for name in ("features", "reconstructions", "spectra"):
        assert [event.step for event in board.Tensors(name)] == [2, 3]


def test_a_workdir_that_cannot_be_written(capsys, tmp_path, small_config_file):
    (tmp_path / "file").write_text("in the way")
    assert str(tmp_path / "file" / "run") in train(capsys, small_config_file, tmp_path / "file" / "run", code=1)


def test_interruption_and_lack_of_memory_are_one_line(capsys, monkeypatch):
    for error, words in (
        (KeyboardInterrupt(), "interrupted"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"), "batch_size"),
        (RuntimeError("UNAVAILABLE: the other side has closed"), "checkpoint"),
        (OSError(28, "No space left on device"), "No space left"),
        (OSError(30, "Read-only file system", "run/metrics.jsonl"), "run/metrics.jsonl: Read-only file system"),
    ):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr("qbheat_jax.tools.doctor.describe", fail)
        assert words in refused(capsys, "doctor", code=1)
    monkeypatch.setattr("qbheat_jax.tools.doctor.describe", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        cli.main(["doctor"])


def test_the_help_of_every_command_has_an_example(capsys):
    code, out, _ = qbheat(capsys, "--help")
    commands = re.findall(r"^    (\w+)", out, re.MULTILINE)
    assert code == 0 and {"pretrain", "preflight", "doctor"} <= set(commands) and len(commands) == 15
    for command in commands:
        code, out, _ = qbheat(capsys, command, "--help")
        assert code == 0 and re.search(rf"^Examples?:\n  qbheat {command}\b", out, re.MULTILINE), command
        assert max(map(len, out.splitlines())) <= 120, command
