"""`qbheat runs`: every run below a directory with its state and results, whatever else lies there, and their page."""

import json
import os
import re

import pytest

from qbheat_jax import cli
from qbheat_jax.errors import PREEMPTED, UserError
from qbheat_jax.report import runs, runs_page
from qbheat_jax.train import lock
from tests import workdirs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return workdirs.several(tmp_path_factory.mktemp("runs"))


def printed(capsys, *argv, code=0):
    assert cli.main(["runs", *map(str, argv)]) == code
    return capsys.readouterr()


def listed(capsys, *argv):
    return json.loads(printed(capsys, *argv, "--json").out)


def test_every_run_is_listed_with_its_state_and_what_was_measured_on_it(folder, capsys):
    with lock.held(folder / "fourth"):
        said = listed(capsys, folder, "--sort", "run")
    rows = {row["run"]: row for row in said["runs"]}
    assert list(rows) == [os.path.join("deep", "third"), "first", "fourth", "second"]
    states = {name.replace(os.sep, "/"): row["state"] for name, row in rows.items()}
    assert states == {"deep/third": "killed", "first": "finished", "fourth": "running", "second": "failed"}
    assert rows["second"]["reason"] == "the loss is nan at step 33" and rows["second"]["step"] == 32
    first = rows["first"]
    assert (first["method"], first["data"], first["step"], first["steps"]) == ("QB-Heat", "photos", 40, 40)
    assert first["loss"] == 1 / 40
    # Of its own probes, and not those of baselines; the mean over seeds.
    assert first["results"] == {"lin": 0.8123, "tran-1": pytest.approx(0.85)}
    assert rows["second"]["results"] == {"tran-1": pytest.approx(0.75)} and rows["fourth"]["results"] == {}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", first["when"])


def test_what_is_no_run_is_skipped_and_counted(folder, capsys):
    skipped = listed(capsys, folder)["skipped"]
    assert sorted(os.path.basename(path) for path in skipped) == ["foreign", "list", "torn"]
    assert all(skipped.values())
    assert printed(capsys, folder).out.splitlines()[-1].startswith("3 folders")


@pytest.mark.parametrize(
    "key, order",
    [
        ("tran-1", ["third", "first", "second", "fourth"]),
        ("lin", ["first"]),
        ("loss", ["first", "second", "third", "fourth"]),
        ("step", ["first"]),
        ("state", ["second"]),
    ],
)
def test_the_table_is_sorted(folder, capsys, key, order):
    lines = printed(capsys, folder, "--sort", key).out.splitlines()
    assert [os.path.basename(line.split(" | ")[0].strip("| ")) for line in lines[2 : 2 + len(order)]] == order


def test_mistakes(folder, capsys, tmp_path):
    assert "tran-4" in printed(capsys, folder, "--sort", "tran-4", code=2).err
    assert "nowhere" in printed(capsys, tmp_path / "nowhere", code=2).err
    assert str(tmp_path / "a.html") in printed(capsys, tmp_path, "--page", tmp_path / "a.html", code=2).err
    assert listed(capsys, tmp_path) == {"runs": [], "skipped": {}, "page": None}


def test_a_moved_run_keeps_the_probes_below_it(folder, tmp_path):
    (folder / "first").rename(tmp_path / "moved")
    try:
        (row,), _ = runs.find(tmp_path)
    finally:
        (tmp_path / "moved").rename(folder / "first")
    assert sorted(row.results) == ["lin", "tran-1"]


def test_logs_with_what_is_no_metric(tmp_path):
    workdirs.write_config(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 4, "train/loss": 0.5}\n[1]\n7\n\xff\xfe\n{"step": "x"}\n{"st')
    ((row,), skipped) = runs.find(tmp_path)
    assert (row.run, row.step, row.steps, row.loss, skipped) == (".", 4, 40, 0.5, {})


def test_a_run_given_in_epochs_and_one_that_has_only_begun(tmp_path):
    workdirs.write_config(tmp_path, total_steps=None, total_epochs=2.0)
    ((row,), _) = runs.find(tmp_path)
    assert (row.step, row.steps, row.epochs, row.loss, row.state) == (0, None, 2.0, None, "killed")
    assert "0 (2 epochs)" in runs.table([row], {})


@pytest.mark.parametrize(
    "error, state, reason",
    [
        (UserError("the loss is nan", exit_code=1), "failed", "the loss is nan"),
        (UserError("stopped", exit_code=PREEMPTED), "killed", ""),
        (KeyboardInterrupt(), "killed", ""),
        (None, "finished", ""),
    ],
)
def test_the_lock_says_how_its_holder_ended(tmp_path, error, state, reason):
    assert lock.state(tmp_path) == ("", "")
    try:
        with lock.held(tmp_path):
            assert lock.state(tmp_path) == ("running", "")
            if error:
                raise error
    except BaseException as raised:
        assert raised is error
    assert lock.state(tmp_path) == (state, reason)
    with lock.held(tmp_path):  # and begins anew
        assert lock.state(tmp_path)[0] == "running"


def test_the_page_draws_what_two_runs_share(folder):
    rows, skipped = runs.find(folder)
    assert runs_page.shared(rows) == ["train/loss", "val/loss", "train/learning_rate"]
    context = runs_page.context(folder, rows, skipped)
    assert [chart["name"] for chart in context["charts"]] == runs_page.shared(rows)
    assert context["charts"][0]["runs"] == [row.run for row in rows] and context["left"] == 0
    assert context["best"]["tran-1"] == pytest.approx(0.9)
    assert "train/data_wait" in runs_page.shared([row for row in rows if row.run == "first"])


def test_more_runs_than_styles_are_in_the_table_alone(folder, tmp_path):
    rows, _ = runs.find(folder)
    many = [runs.dataclasses.replace(rows[0], run=f"run-{n}") for n in range(runs_page.MOST + 2)]
    page = runs_page.write(tmp_path / "many.html", folder, many, {}).read_text()
    assert page.count('<th scope="row"') == len(many)
    assert runs_page.context(folder, many, {})["left"] == 2
