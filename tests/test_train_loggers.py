"""Loggers: each has the run's figures, once, also when it resumes; one that fails, hangs or is missing holds up nothing."""

import csv
import importlib.util
import json
import logging
import threading
import time

import jax
import numpy as np
import pytest

from qbheat_jax import config as config_lib
from qbheat_jax.errors import BAD_INPUT, UserError
from qbheat_jax.tasks import pretrain
from qbheat_jax.train import config_tables, loggers, metrics

INSTALLED = {name: importlib.util.find_spec(name) is not None for name in ("wandb", "mlflow")}
LINES = [(1, {"train/loss": 2.0}), (2, {"train/loss": 1.0}), (2, {"val/loss": 1.5}), (3, {"train/loss": 0.5})]


def interrupted(workdir, names, config=None):
    """Log LINES; die behind them; resume from step 2, and log again what came after it, and more."""
    workdir.mkdir(exist_ok=True)
    for first, lines in ((0, LINES), (2, [*LINES[3:], (4, {"train/loss": 0.25})])):
        writer = metrics.Writer(workdir, first, names, config)
        for step, values in lines:
            writer.write(step, values)
        writer.close(failed=not first)


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """However slow this machine is, what a logger was told arrives."""
    monkeypatch.setattr(loggers, "PATIENCE", 600.0)


class Recorder(loggers.Logger):
    """Keeps its calls, and raises at the call named `fails`."""

    library, remote, fails, calls = "", False, "", []

    def __init__(self, run):
        self._call("start", run)
        run.keep("recorder", "1234")

    def write(self, step, values):
        self._call("write", step, values)

    def show(self, step, pictures):
        self._call("show", step, pictures)

    def close(self, failed):
        self._call("close", failed)

    def _call(self, name, *arguments):
        type(self).calls.append((name, *arguments))
        if name == self.fails:
            raise ConnectionError("no route to host\nand a second line")


@pytest.fixture(params=[False, True], ids=["here", "remote"])
def recorder(request, monkeypatch):
    """Function of the name of the failing call -> a Recorder class that is the logger `recorder`."""

    def make(fails=""):
        kind = type("Recorder", (Recorder,), {"remote": request.param, "fails": fails, "calls": []})
        monkeypatch.setitem(loggers.LOGGERS, "recorder", kind)
        return kind

    return make


def run(workdir):
    writer = metrics.Writer(workdir, 0, "recorder,csv")
    for step, values in LINES:
        writer.write(step, values)
    writer.show(3, {"features": np.zeros((2, 2, 3), np.uint8)})
    writer.close()


def rows(workdir):
    return list(csv.DictReader((workdir / "metrics.csv").open()))


@pytest.mark.parametrize("fails, calls", [("start", 1), ("write", 2), ("show", 6), ("close", 7)])
def test_a_logger_that_fails_is_told_once_and_dropped(tmp_path, recorder, caplog, fails, calls):
    kind = recorder(fails)
    run(tmp_path)
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(told) == 1 and "recorder" in told[0] and "ConnectionError: no route to host" in told[0]
    assert "\n" not in told[0]
    # A remote one is closed where it still stands, so that no process of its own is left.
    left = kind.remote and fails in ("write", "show")
    assert len(kind.calls) == calls + left and kind.calls[-1][0] == ("close" if left else fails)
    assert len(rows(tmp_path)) == 4 and len(metrics.read(tmp_path)) == 4, "the others go on"


def test_a_logger_is_told_everything_in_order(tmp_path, recorder):
    kind = recorder()
    run(tmp_path)
    assert [call[0] for call in kind.calls] == ["start", *["write"] * 4, "show", "close"]
    assert [call[1:] for call in kind.calls[1:5]] == LINES and kind.calls[-1][1] is False


def test_a_remote_logger_that_hangs_holds_up_nothing(tmp_path, monkeypatch, caplog):
    free = threading.Event()

    class Hanging(loggers.Logger):
        remote = True

        def __init__(self, run):
            free.wait()

    monkeypatch.setitem(loggers.LOGGERS, "recorder", Hanging)
    monkeypatch.setattr(loggers, "PATIENCE", 0.1)
    start = time.perf_counter()
    run(tmp_path)
    assert time.perf_counter() - start < 5.0
    free.set()
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == [
        "logger recorder failed (TimeoutError: it is not done after 0.1 s) and is dropped; the run goes on, and "
        "metrics.jsonl has its figures"
    ]


def test_only_process_0_logs(tmp_path, monkeypatch, recorder):
    kind = recorder()
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    run(tmp_path)
    assert kind.calls == [] and not list(tmp_path.iterdir())


def test_what_a_server_has_is_not_sent_again(tmp_path, recorder):
    kind = recorder()
    interrupted(tmp_path, "recorder")
    sent = [call[1:] for call in kind.calls if call[0] == "write"]
    again = [] if kind.remote else LINES[3:]
    assert sent == [*LINES, *again, (4, {"train/loss": 0.25})]
    assert [call[1] for call in kind.calls if call[0] == "close"] == [True, False]


def test_a_server_that_is_new_to_a_resumed_run_gets_all_of_it(tmp_path, recorder):
    interrupted(tmp_path, "csv")
    kind = recorder()
    writer = metrics.Writer(tmp_path, 2, "recorder")
    writer.write(*LINES[3])
    writer.close()
    assert [call[1:] for call in kind.calls if call[0] == "write"] == [LINES[3]]


def test_csv_has_a_row_a_line_and_a_column_a_metric(tmp_path):
    interrupted(tmp_path, "csv")
    assert [(row["step"], row["train/loss"], row["val/loss"]) for row in rows(tmp_path)] == [
        ("1", "2.0", ""), ("2", "1.0", ""), ("2", "", "1.5"), ("3", "0.5", ""), ("4", "0.25", ""),
    ]  # fmt: skip


@pytest.mark.parametrize("value", ["tensorboard,excel", "wandb;csv", 3])
def test_unknown_loggers_are_refused(value):
    with pytest.raises(UserError) as caught:
        config_tables.resolve({"total_steps": 1, "loggers": value})
    assert caught.value.exit_code == BAD_INPUT
    assert f"loggers={value!r}" in str(caught.value)


def test_a_missing_library_is_refused_before_the_run(small_config, tmp_path, monkeypatch):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        pretrain.run(small_config(loggers="csv, wandb"), tmp_path)
    assert caught.value.exit_code == BAD_INPUT and "qbheat_jax[wandb]" in str(caught.value)
    assert not (tmp_path / "config.json").exists()


def test_a_config_without_loggers_resumes(small_config):
    old = config_lib.flatten(small_config().to_dict())
    del old["loggers"]
    assert config_tables.resolve(old).loggers == "tensorboard"
    assert config_lib.differing(old, small_config(loggers="csv"), config_tables.of) == []


@pytest.mark.skipif(not INSTALLED["mlflow"], reason="mlflow is not installed")
def test_mlflow_in_a_store_of_files(tmp_path, monkeypatch, small_config, caplog):
    from mlflow import tracking

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    interrupted(tmp_path / "run", "mlflow", small_config())
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    client = tracking.MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name(loggers.PROJECT).experiment_id])
    assert found.info.run_id == json.loads((tmp_path / "run" / "loggers.json").read_text())["mlflow"]
    assert (found.info.run_name, found.info.status) == ("run", "FINISHED")
    assert found.data.params["encoder.name"] == "pebble"
    losses = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in losses] == [(1, 2.0), (2, 1.0), (3, 0.5), (4, 0.25)]
    assert [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, "val/loss")] == [(2, 1.5)]


@pytest.mark.skipif(not INSTALLED["wandb"], reason="wandb is not installed")
def test_wandb_offline(tmp_path, monkeypatch, small_config, caplog):
    monkeypatch.setenv("WANDB_MODE", "offline")
    interrupted(tmp_path / "run", "wandb", small_config())
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    name = json.loads((tmp_path / "run" / "loggers.json").read_text())["wandb"]
    files = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{name}.wandb"))
    assert len(files) == 2, "two parts of one run"
    deadline = time.monotonic() + 60  # its service writes on behind `finish`
    while time.monotonic() < deadline and not all(map(ended, files)):
        time.sleep(0.1)
    content = [history(file) for file in files]
    assert [(line["step"], line.get("train/loss"), line.get("val/loss")) for part in content for line in part] == [
        (1, 2.0, None), (2, 1.0, None), (2, None, 1.5), (3, 0.5, None), (4, 0.25, None),
    ]  # fmt: skip


def records(path):
    """What is in the file of an offline run of Weights & Biases, which is a log of LevelDB with another header."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole, found = path.read_bytes(), 7, b"", []
    while place < len(data):
        if 32768 - place % 32768 < 7:  # a record never begins in the last bytes of a block
            place += 32768 - place % 32768
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            found.append(wandb_internal_pb2.Record.FromString(whole))
            whole = b""
    return found


def ended(path):
    """Whether the last record of an offline run says how it ended."""
    found = records(path)
    return bool(found) and found[-1].HasField("exit")


def history(path):
    """What an offline run of Weights & Biases logged, a dict a call."""
    lines = []
    for record in records(path):
        items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        if items:
            lines.append({key: value for key, value in items.items() if not key.startswith("_")})
    return lines
