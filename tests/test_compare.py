"""Comparisons: figures come from their cells, nothing runs twice, and a failed cell does not stop the others."""

import json
import re
import statistics
from pathlib import Path

import pytest

from qbheat_jax import cli, compare
from qbheat_jax.errors import PREEMPTED, UserError
from qbheat_jax.report import charts, comparison_page
from qbheat_jax.tasks import detect, pretrain, probe
from qbheat_jax.train import config_tables
from tests.conftest import leave_one_device
from tests.workdirs import COMPARISON, compared, comparison_config

CONFIGS = Path(__file__).parent.parent / "configs" / "compare"


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    return comparison_config(tmp_path_factory.mktemp("compare"))


@pytest.fixture(scope="module")
def done(config_file, tmp_path_factory):
    """Return (workdir, result) of the whole comparison on one device, since programs for eight compile more slowly."""
    workdir = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        leave_one_device(patch)
        return workdir, compare.run(compare.read(config_file), workdir)


def refused(*argv):
    with pytest.raises(UserError) as caught:
        compare.read(*argv)
    return str(caught.value)


def without_charts(monkeypatch):
    """Leave out what is drawn for every encoder, where a test is about something else."""
    for chart in ("dots", "against"):
        monkeypatch.setattr(charts, chart, lambda *_: "")


def forbidden(*_):
    raise AssertionError("a finished cell was run again")


def test_every_figure_is_that_of_its_cell(done):
    workdir, result = done
    assert json.loads((workdir / "result.json").read_text()) == result and result["finished"]
    assert list(result["methods"]) == ["supervised", "masked", "random", "pixels"]
    # Two runs and two probes of two methods, two probes of the random encoder, for two seeds; pixels need one.
    assert len(result["cells"]) == 2 * (2 * 3 + 2) + 2 and all(cell["state"] == "done" for cell in result["cells"])
    for name, method in result["methods"].items():
        for probe_name, entry in method["probes"].items():
            seeds = [0] if name == "pixels" else [0, 1]
            places = {s: workdir / f"{name}/seed-{s}/probe/{probe_name}/result.json" for s in seeds}
            own = {s: json.loads(place.read_text()) for s, place in places.items()}
            assert entry["seeds"] == {str(s): r["top1"] for s, r in own.items()} and entry["failed"] == []
            assert all(r["seed"] == s and r["data"] == "synthetic:64" for s, r in own.items())  # not the file's photos
            assert entry["mean"] == statistics.fmean(entry["seeds"].values())
            assert entry["std"] == (None if name == "pixels" else statistics.stdev(entry["seeds"].values()))
            random = result["methods"]["random"]["probes"][probe_name]["seeds"]
            if method["trained"]:
                ahead = {s: value - random[s] for s, value in entry["seeds"].items()}
                assert method["ahead_of_random"][probe_name]["seeds"] == ahead
    for name in ("supervised", "masked"):
        method = result["methods"][name]
        runs = [json.loads((workdir / f"{name}/seed-{s}/summary.json").read_text()) for s in (0, 1)]
        assert method["examples"] == 32 and method["epochs"] == 0.5
        assert method["seconds"] == pytest.approx(statistics.fmean(run["seconds"] for run in runs))
        assert method["gflops_per_image"] == runs[0]["gflops_per_image"] > 0
        assert method["pflops"] == pytest.approx(32 * runs[0]["gflops_per_image"] / 1e6)
        trained = config_tables.from_json((workdir / f"{name}/seed-1/config.json").read_text())
        assert trained.seed == 1 and trained.weight_decay == 0.0
    assert not list(workdir.glob("**/features"))


def test_table_and_page_say_the_same(done):
    workdir, result = done
    entry = result["methods"]["masked"]["probes"]["knn"]
    score = f"{entry['mean']:.3f} ± {entry['std']:.3f}"
    markdown, text = (workdir / "table.md").read_text(), compare.text(result)
    assert score in markdown and score in text and "failed" not in text.lower()
    best = max(result["methods"][name]["probes"]["knn"]["mean"] for name in ("supervised", "masked"))
    assert f"**{best:.3f} ± " in markdown
    columns = [line.split("  ")[0] for line in text.splitlines()]
    trained = ["supervised", "masked"]
    assert [c for c in columns if c in result["methods"]] == [*trained, "random", "pixels", *trained]
    page = (workdir / "report" / "index.html").read_text()
    assert f"{100 * entry['mean']:.1f} ± {100 * entry['std']:.1f}" in page
    assert page.count("<svg") == 2 * 3 and "http" not in re.sub(r"https://arxiv.org/\S*", "", page)
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_a_finished_comparison_runs_nothing(done, config_file, monkeypatch, capsys):
    workdir, result = done
    monkeypatch.setattr(pretrain, "run", forbidden)
    monkeypatch.setattr(probe, "run", forbidden)
    assert cli.main(["compare", "--config", config_file, "--workdir", str(workdir)]) == 0
    assert capsys.readouterr().out == compare.text(result) + "\n"


def test_only_what_is_missing_is_run(done, config_file, monkeypatch):
    workdir, result = done
    lost = workdir / "masked/seed-1/probe/knn/result.json"
    before = json.loads(lost.read_text())
    lost.unlink()
    monkeypatch.setattr(pretrain, "run", forbidden)
    calls, original = [], probe.run
    monkeypatch.setattr(probe, "run", lambda *a: calls.append(str(a[1])) or original(*a))
    again = compare.run(compare.read(config_file), workdir)
    assert calls == [str(lost.parent)] and json.loads(lost.read_text())["top1"] == before["top1"]
    assert again["methods"] == result["methods"]


def test_another_config_is_refused_before_anything_is_run(done, config_file, monkeypatch):
    workdir, _ = done
    monkeypatch.setattr(pretrain, "run", forbidden)
    for key, text, words in (
        ("methods.masked.learning_rate", "0.5", ("masked/seed-0 ", "learning_rate=0.01", "0.5")),
        ("probe.standardise", "False", ("supervised/seed-0/probe/linear ", "standardise=True", "False")),
    ):
        with pytest.raises(UserError) as caught:
            compare.run(compare.read(config_file, [(key, text)]), workdir)
        assert all(word in str(caught.value) for word in ("--workdir", str(workdir), *words)), caught.value
    plan = compare.read(config_file, [("all.log_every", "2")])  # how a run is watched may change
    monkeypatch.setattr(probe, "run", forbidden)
    assert compare.run(plan, workdir)["finished"]


def test_sigterm_stops_the_comparison_and_fails_no_cell(config_file, tmp_path, monkeypatch, capsys):
    calls = []

    def stopped(config, folder):
        calls.append(folder)
        raise UserError("stopped by SIGTERM at step 1 of 2, which is saved", exit_code=PREEMPTED)

    monkeypatch.setattr(pretrain, "run", stopped)
    assert cli.main(["compare", "--config", config_file, "--workdir", str(tmp_path)]) == PREEMPTED
    assert len(calls) == 1 and "at step 1 of 2" in capsys.readouterr().err
    cells = json.loads((tmp_path / "result.json").read_text())["cells"]
    assert {cell["state"] for cell in cells} == {"waiting"}


def test_what_fails_is_shown_and_the_rest_goes_on(config_file, tmp_path, monkeypatch, capsys):
    """A pre-training run fails with a UserError and a probe with a bug; the other cells still run."""
    trained = []

    def train(config, folder):
        if config.objective == "simmim" and config.seed == 0:
            raise UserError("the loss is nan at step 2", exit_code=1)
        trained.append(str(folder.relative_to(tmp_path)))
        (folder / "checkpoints" / "2").mkdir(parents=True)
        summary = {"step": 2, "steps_run": 1, "seconds": 4.0, "images_per_second": 4.0, "gflops_per_image": 0.5}
        (folder / "summary.json").write_text(json.dumps(summary))

    def look(config, folder, init, store):
        if init == "pixels":
            raise ZeroDivisionError("division\nby zero")
        folder.mkdir(parents=True)
        result = {"top1": 0.5, "top5": 0.9, "n": 8, "chance": 0.1, "seconds": 1.0, "init": init}
        result["protocol"] = config.protocol
        (folder / "result.json").write_text(json.dumps(result))
        return result

    monkeypatch.setattr(pretrain, "run", train)
    monkeypatch.setattr(probe, "run", look)
    without_charts(monkeypatch)
    command = ["compare", "--config", config_file, "--workdir", str(tmp_path)]
    assert cli.main(command) == 1
    captured = capsys.readouterr()
    assert "3 of 18" in captured.err and "masked/seed-0" in captured.err and "Traceback" not in captured.err
    assert trained == ["supervised/seed-0", "supervised/seed-1", "masked/seed-1"]
    result = json.loads((tmp_path / "result.json").read_text())
    states = {cell["path"]: cell["state"] for cell in result["cells"]}
    assert states["masked/seed-0"] == "failed" and states["masked/seed-0/probe/knn"] == "not run"
    assert states["masked/seed-1/probe/knn"] == states["random/seed-1/probe/knn"] == "done" and not result["finished"]
    reasons = {cell["path"]: cell["reason"] for m in result["methods"].values() for cell in m["failed"]}
    assert reasons["pixels/seed-0/probe/knn"] == "ZeroDivisionError: division"
    assert result["methods"]["masked"]["probes"]["knn"]["failed"] == ["0"]
    # A run that was interrupted: of 32 images at 4 images/s.
    assert result["methods"]["supervised"]["seconds"] == 8.0
    for shown in (captured.out, (tmp_path / "table.md").read_text(), (tmp_path / "report/index.html").read_text()):
        assert "the loss is nan at step 2" in shown and "1 failed" in shown and "failed" in shown

    trained.clear()
    monkeypatch.setattr(pretrain, "run", lambda config, folder: trained.append(config.seed))
    assert cli.main(command) == 1  # pixels fail again; the failed run is retried
    assert trained == [0]


def test_a_warning_names_unequal_budgets(config_file, caplog, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "run", lambda *_: 1 / 0)
    monkeypatch.setattr(probe, "run", lambda *_: 1 / 0)
    without_charts(monkeypatch)
    plan = compare.read(config_file, [("methods.masked.total_epochs", "2")])
    result = compare.run(plan, tmp_path)
    (warning,) = result["warnings"]
    assert "supervised 32, masked 128" in warning and warning in caplog.text and warning in compare.text(result)
    assert [result["methods"][name]["epochs"] for name in ("supervised", "masked")] == [0.5, 2.0]


def test_errors_name_the_place_the_field_and_the_value(config_file):
    for key, text, words in (
        ("methods.masked.learningrate", "1", ("methods.masked: ", "learningrate", "learning_rate")),
        ("methods.masked.simmim.mask_size", "5", ("methods.masked: ", "simmim.mask_size=5")),
        ("methods.supervised.warmup", "9", ("methods.supervised: ", "warmup", "9")),
        ("all.batch_size", "many", ("all: ", "batch_size", "'many'")),
        ("probe.optimizer", "sdg", ("probes.linear: ", "optimizer='sdg'")),
        ("seeds", "(0, 0)", ("seeds=(0, 0)", "4294967295")),
        ("baselines", "chance", ("baselines=('chance',)", "random, pixels, histogram")),
        ("methods.moco.width", "3", ("--config.methods.moco.width", "methods.NAME.FIELD", "supervised, masked")),
        ("pretrain", "nowhere.py", ("nowhere.py",)),
    ):
        message = refused(config_file, [(key, text)])
        assert all(word in message for word in words), message
    for fields, words in (
        ({"method": {}}, ("wrong.py", "method ", "methods")),
        ({"methods": {}}, ("methods={}",)),
        ({"methods": {"random": {}}}, ("methods", "'random'")),
        ({"methods": {"a/b": {}}}, ("methods", "'a/b'")),
        ({"methods": {"a": 3}}, ("methods.a=3", "dict")),
        ({"probes": {"lin": 3}}, ("probes.lin: ", "lin=3", "config file")),
    ):
        path = Path(config_file).with_name("wrong.py")
        path.write_text(f"def get_config():\n    return {COMPARISON | fields!r}\n")
        message = refused(str(path))
        assert all(word in message for word in words), message


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_our_comparisons_can_be_run(path):
    """Each config resolves, builds and opens its data, and its methods see the same number of images."""
    if "photos" not in path.read_text():
        pytest.skip("its data set is not in a wheel")
    plan = compare.read(str(path))
    assert plan.methods and len({m.examples for m in plan.methods if m.config is not None}) == 1


def test_a_detector_is_one_more_evaluation(config_file, tmp_path, monkeypatch, one_device):
    """A detector runs on each encoder, its AP is in the table, and a second call runs nothing."""
    detector = {
        "objective": "dense", "data.source": "scenes:16", "data.max_boxes": 8, "batch_size": 8, "total_steps": 1,
        "dense.strides": (8, 16), "dense.width": 8, "dense.depth": 0, "detector.count": 5, "log_every": 1,
    }  # fmt: skip
    place = Path(config_file).parent
    (place / "scenes.py").write_text(f"def get_config():\n    return {detector!r}\n")
    fields = {"seeds": (0,), "probes": {"found": "scenes.py"}, "methods": {"masked": COMPARISON["methods"]["masked"]}}
    (place / "detects.py").write_text(f"def get_config():\n    return {COMPARISON | fields!r}\n")
    plan = compare.read(str(place / "detects.py"))
    assert [cell.path for cell in plan.cells() if cell.detects] == [
        f"{m}/seed-0/probe/found" for m in ("masked", "random")
    ]
    config = plan.probes["found"]
    assert config.encoder.name == "pebble" and config.image_size == 32 and config.data.source == "scenes:16"
    result = compare.run(plan, tmp_path)
    assert result["finished"] and result["detectors"] == {"found": "scenes:16"}
    for name in ("masked", "random"):
        own = json.loads((tmp_path / name / "seed-0/probe/found/result.json").read_text())
        assert result["methods"][name]["probes"]["found"]["seeds"] == {"0": own["AP"]} and own["n"] > 0
        assert own["init"] == ("random" if name == "random" else str(tmp_path / "masked/seed-0"))
    assert compare.text(result).startswith("AP of found on scenes:16, seed 0.")
    assert "AP under found: masked" in (tmp_path / "report" / "index.html").read_text()
    for module in (pretrain, detect):
        monkeypatch.setattr(module, "run", forbidden)
    assert compare.run(plan, tmp_path)["methods"] == result["methods"]
    (place / "scenes.py").write_text(f"def get_config():\n    return { {**detector, 'total_steps': 2}!r}\n")
    with pytest.raises(UserError, match=r"masked/seed-0/probe/found .*total_steps=1 .*2"):
        compare.run(compare.read(str(place / "detects.py")), tmp_path)
    for wrong, words in (({"data.source": "photos"}, "photos"), ({"data.eval_split": ""}, "data.eval_split=''")):
        (place / "scenes.py").write_text(f"def get_config():\n    return { {**detector, **wrong}!r}\n")
        message = refused(str(place / "detects.py"))
        assert "probes.found: " in message and words in message


def test_a_page_before_anything_is_finished(config_file, tmp_path):
    from qbheat_jax.compare import table

    context = comparison_page.context(table.gather(compare.read(config_file), tmp_path, {}))
    assert context["done"] == 0 and context["charts"] == [] and context["headlines"] == []


def test_monitors_are_correlated_with_the_probes(tmp_path):
    plan = compare.read(comparison_config(tmp_path))
    compared(plan, tmp_path)
    result = compare.table.gather(plan, tmp_path, {})
    assert set(result["methods"]["masked"]["label_free"]) == {"rankme", "lidar", "alpha_req"}
    # Two methods and the untrained encoder, of two seeds; not the features without an encoder.
    for name in ("linear", "knn"):
        found = result["rank_correlations"][name]
        assert [found[key]["n"] for key in ("rankme", "lidar", "alpha_req")] == [6, 6, 6]
        assert [found[key]["spearman"] for key in ("rankme", "lidar", "alpha_req")] == [1.0, -1.0, None]
    assert "| linear | +1.00 | -1.00 | - | 6 |" in compare.table.markdown(result)
    plan = compare.read(comparison_config(tmp_path, seeds=(0,)))
    assert compare.table.gather(plan, tmp_path, {})["rank_correlations"] == {}
