"""Every path of the command line and of configs goes through one door."""

import json
import os

import pytest

from qbheat_jax import api, cli, data, paths
from qbheat_jax.errors import UserError


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder of its own, and another folder to run in, where nothing named ~ may appear."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "home"
    assert not list((tmp_path / "here").iterdir()), "nothing was written where the command ran"


def test_expand(home):
    assert paths.expand("~/x") == str(home / "x") and paths.expand("~") == str(home)
    for same in ("x", "./~", "/a/~", "gs://bucket/~/x", "-"):
        assert paths.expand(same) == same
    for wrong in ("", "  ", "a\0b", "~no-such-user/x"):
        with pytest.raises(UserError) as caught:
            paths.expand(wrong, "--workdir")
        assert "--workdir" in str(caught.value) and caught.value.exit_code == 2


def test_a_home_folder_is_meant_by_a_tilde_everywhere(home, small_config_file, capsys, one_device):
    config = home / "small.py"
    config.write_text(small_config_file.read_text())
    assert cli.main(["pretrain", "--config=~/small.py", "--workdir=~/run", "--config.total_steps=2"]) == 0
    assert (home / "run" / "checkpoints").is_dir()
    assert api.load("~/run").step == 2
    probe = home / "probe.py"
    probe.write_text("def get_config():\n    return {'protocol': 'knn', 'batch_size': 16}\n")
    assert cli.main(["probe", "--config=~/probe.py", "--init=~/run", "--workdir=~/probe"]) == 0
    assert json.loads((home / "probe" / "result.json").read_text())["protocol"] == "knn"
    assert (
        cli.main(["export", "--from=~/run", "--to=~/encoder.stablehlo"]) == 0 and (home / "encoder.stablehlo").exists()
    )
    capsys.readouterr()
    assert cli.main(["pretrain", "--config=~/small.py", "--workdir=~/run2", "--init=~/none"]) == 2
    assert str(home / "none") in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--workdir", "--config", "--init"])
def test_an_empty_path_is_refused_before_anything_is_written(home, flag, capsys):
    given = {"--workdir": "w", "--config": "c.py", "--init": "run", flag: ""}
    assert cli.main(["pretrain", *(f"{name}={value}" for name, value in given.items())]) == 2
    assert f"{flag} is empty" in capsys.readouterr().err


def test_paths_of_sources(home):
    from PIL import Image

    (home / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(home / "photos" / "1.png")
    assert data.open_source("folder:~/photos").splits == {"train": 1}
    truth = {
        "images": [{"id": 1, "file_name": "1.png", "width": 8, "height": 8}],
        "categories": [{"id": 1, "name": "a"}],
    }
    (home / "a.json").write_text(json.dumps({**truth, "annotations": []}))
    assert data.open_source("coco:~/photos,~/a.json").splits == {"train": 1}
    with pytest.raises(UserError, match=os.path.join(str(home), "data")):
        data.open_source("tfds:no_such_data_set", tfds_dir="~/data")


def test_names_for_one_line():
    assert paths.printable("a\nb\tc") == "a\\nb\\tc" and paths.printable("Zoë 水.png") == "Zoë 水.png"
    assert paths.printable(os.fsdecode(b"\xff.png")).isascii()
