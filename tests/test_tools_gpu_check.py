"""launch/gpu_check.sh: every part runs with tiny sizes; jobs that hang, abort or fail do not affect the others."""

import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from qbheat_jax.tools.gpu_check import PARTS, TINY_ENCODER, pool, resume, text, values
from tests.conftest import QUICKLY

SCRIPT = pathlib.Path(__file__).parent.parent / "launch" / "gpu_check.sh"


def check(*arguments, **environment):
    """Run the script on one CPU device and return (exit code, stdout, stderr)."""
    environment = {
        "PYTHON": sys.executable, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICKLY,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2", **environment,
    }  # fmt: skip
    got = subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, env={**os.environ, **environment}
    )
    return got.returncode, got.stdout, got.stderr


@pytest.mark.weekly
def test_every_part_runs_and_is_reported(tmp_path):
    pytest.importorskip("torch")
    code, out, log = check("--tiny", "--out", tmp_path)
    assert code == 0, log
    assert out.strip() == str(tmp_path / "result.md")
    result = json.loads((tmp_path / "result.json").read_text())
    assert list(result["parts"]) == list(PARTS) and result["machine"]["platform"] == "cpu"
    assert all(part["passed"] and part["seconds"] < part["limit"] for part in result["parts"].values())
    found = {f"{p} {j}": job["result"] for p, part in result["parts"].items() for j, job in part["jobs"].items()}
    one = found[f"values {TINY_ENCODER}"]
    assert one["float32"]["gradients"] == 0 < one["bfloat16"]["gradients"] < 0.1  # the device is the CPU here
    again = found["resume plain"]["runs"]["same program"]
    assert again["bitwise"] and again["largest"] == 0 and again["resumed_at"] in (1, 2)
    assert again["loss"] == again["other_loss"]
    assert len(found["objectives mae"]["losses"]) == 3
    step = found[f"steps {TINY_ENCODER}"]
    assert step["images_per_second"] > 0 and step["mfu"] is None and step["flops_by_type"]["float32"] > 0
    assert 0 < len(step["kernels"]) <= 20 and step["launches"] >= len(step["kernels"]) and step["kernel_ms"] > 0
    peer = found[f"peers {TINY_ENCODER}"]
    assert set(peer["images_per_second"]) == {"jax", "torch channels-last"}
    losses = peer["first_losses"]  # for equal weights and images
    assert losses["jax"] == pytest.approx(losses["torch channels-last"], rel=1e-4)
    report = (tmp_path / "result.md").read_text()
    assert all(f"## `{name}`: passed" in report for name in PARTS) and "NOT PASSED" not in report


def test_a_missing_module_or_gpu_is_one_error_line(tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # without installed packages
    bare.chmod(0o755)
    code, out, err = check("values", PYTHON=str(bare))
    assert code == 2 and out == "" and len(err.splitlines()) == 1 and str(bare) in err and "ml_collections" in err
    code, out, err = check("values", "--out", tmp_path, CUDA_VISIBLE_DEVICES="")
    assert code == 2 and out == "" and "--tiny" in err.splitlines()[-1]
    assert check("speed", "--out", tmp_path)[0] == 2


# --- Jobs -----------------------------------------------------------------------------------------------------------


def shell(script):
    return ["bash", "-c", script]


def crowd(folder, commands, seconds=20.0, parallel=4, timed=False):
    commands = {name: shell(script.replace("HERE", str(folder / name))) for name, script in commands.items()}
    return pool.run(commands, folder, dict(os.environ), seconds, parallel, timed)


DONE = """echo '{"problems": [], "x": 1}' > HERE/result.json; """


def test_a_failed_job_does_not_affect_the_others(tmp_path):
    got = crowd(
        tmp_path,
        {
            "good": DONE,
            "abort": DONE + "echo 'F0000 tiling.cc:1] Check failed: a == b (1 vs. 2)'; echo '*** stack'; kill -ABRT $$",
            "error": "echo 'Traceback'; echo 'ValueError: no'; exit 1",
            "silent": "true",
            "wrong": """echo '{"problems": ["features differ"], "doing": "looking"}' > HERE/result.json""",
        },
    )
    assert {name: one["state"] for name, one in got.items()} == dict(
        good="passed", abort="failed", error="failed", silent="failed", wrong="failed"
    )
    assert got["good"]["result"]["x"] == got["abort"]["result"]["x"] == 1
    assert "SIGABRT" in got["abort"]["error"] and "Check failed: a == b" in got["abort"]["error"]
    assert "exit code 1" in got["error"]["error"] and "ValueError: no" in got["error"]["error"]
    assert got["wrong"]["error"] == "features differ" and "result" in got["silent"]["error"]


def test_a_timeout_keeps_measurements_and_leaves_no_process(tmp_path):
    slow = """echo '{"problems": [], "x": 2, "doing": "compiling"}' > HERE/result.json; sleep 60 & echo $! > HERE/pid; wait"""
    got = crowd(tmp_path, {"slow": slow, "later": DONE}, seconds=1.0, parallel=1)
    assert list(got) == ["slow", "later"]
    assert got["slow"]["state"] == "timed out" and got["slow"]["result"]["x"] == 2
    assert "limit of 1 s" in got["slow"]["error"] and "compiling" in got["slow"]["error"]
    assert got["later"]["state"] == "not begun" and got["slow"]["seconds"] < 5
    child = pathlib.Path("/proc") / (tmp_path / "slow" / "pid").read_text().strip() / "status"

    def ended():
        try:
            return "\nState:\tZ" in child.read_text()
        except OSError:
            return True

    end = time.monotonic() + 10
    while not ended() and time.monotonic() < end:  # a busy machine delivers SIGKILL late
        time.sleep(0.05)
    assert ended()


def test_other_jobs_are_paused_while_one_is_timed(tmp_path):
    turn = """touch HERE/ready; until [ -e HERE/go ]; do sleep 0.02; done; sleep 0.4; rm HERE/ready HERE/go; """
    beat = "for i in 1 2 3 4 5 6 7 8; do date +%s%N >> HERE/beats; sleep 0.1; done; "
    got = crowd(tmp_path, {"a": turn + DONE, "b": "sleep 0.1; " + turn + DONE, "busy": beat + DONE}, timed=True)
    assert all(one["state"] == "passed" for one in got.values())
    beats = np.array((tmp_path / "busy" / "beats").read_text().split(), np.int64) / 1e9
    assert np.diff(beats).max() > 0.35 and np.diff(beats).min() < 0.3


# --- Verdicts and report --------------------------------------------------------------------------------------------


def test_a_wrong_gradient_of_one_block_is_found():
    draw = np.random.default_rng(0)
    true = (draw.normal(size=(2, 3)), {name: {"kernel": draw.normal(size=(4, 4))} for name in "abc"})
    assert values.wrong(values.compare(true, true), "float32") == []
    other = (true[0], {**true[1], "b": {"kernel": true[1]["b"]["kernel"].T}})
    (gradients, block) = values.wrong(values.compare(true, other), "float32")
    assert "gradients" in gradients and "(b)" in block
    nothing = (true[0] * np.nan, other[1])
    assert len(values.wrong(values.compare(true, nothing), "bfloat16")) >= 1


def test_the_report_accepts_a_mostly_empty_result():
    jobs = {"x": {"state": "timed out", "seconds": 9.0, "error": "stopped", "result": {"doing": "compiling"}}}
    machine = {
        "device": "a GPU", "devices": 1, "memory_bytes": 2**30, "driver": "1", "cores": 2, "python": "3", "versions": {},
        "XLA_FLAGS": "", "compiled_before": True,
    }  # fmt: skip
    parts = {
        name: {"question": part.question, "limit": 1.0, "seconds": 1.0, "passed": passed, "jobs": jobs}
        for (name, part), passed in zip(PARTS.items(), (True, False, None, False, None))
    }
    report = text.markdown({"machine": machine, "tiny": False, "parts": parts})
    assert report.count("**timed out**") == len(PARTS) and "`steps`: NOT PASSED" in report and "not finished" in report


def test_the_parts_take_at_most_seven_minutes():
    assert sum(part.seconds for part in PARTS.values()) <= 410
    assert resume.DETERMINISTIC.startswith("--xla_gpu_")
