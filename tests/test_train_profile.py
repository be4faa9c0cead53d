"""--profile_steps: a trace of exactly the steps asked for, files for TensorBoard and Perfetto, and a table of kernels."""

import json
import logging
import shutil

import jax
import pytest

from qbheat_jax import cli
from qbheat_jax.errors import UserError
from qbheat_jax.tasks import pretrain
from qbheat_jax.train import profile


def trace_files(workdir):
    return {"".join(path.suffixes[-2:]) for path in (workdir / "profile" / "plugins" / "profile").glob("*/*")}


def test_a_run_writes_a_trace_and_a_table(one_device, small_config, tmp_path, caplog):
    caplog.set_level(logging.INFO, "qbheat")
    pretrain.run(small_config(checkpoint_every=6), tmp_path, traced=(2, 4))
    assert any(name.endswith(".xplane.pb") for name in trace_files(tmp_path))
    assert any(path.name == "perfetto_trace.json.gz" for path in (tmp_path / "profile").rglob("*"))
    table = json.loads((tmp_path / "profile" / "kernels.json").read_text())
    assert (table["first"], table["last"], table["devices"]) == (2, 4, 0)
    rows = table["kernels"]
    assert 0 < rows[0]["ms"] <= table["kernel_ms"] and table["step_ms"] > 0 and table["launches"] > 10
    assert [row["ms"] for row in rows] == sorted((row["ms"] for row in rows), reverse=True)
    assert sum(row["ms"] for row in rows) == pytest.approx(table["kernel_ms"])
    assert sum(row["times"] for row in rows) == pytest.approx(table["launches"])
    assert "profile of steps 3 to 4" in caplog.text and rows[0]["name"] in caplog.text
    # Both steps, and no other.
    host = jax.profiler.ProfileData.from_file(str(next((tmp_path / "profile").rglob("*.xplane.pb"))))
    names = [e.name for plane in host.planes for line in plane.lines for e in line.events]
    assert names.count("train") == 2


def test_the_trace_of_a_resumed_run_begins_after_its_first_step(one_device, small_config, tmp_path, caplog):
    pretrain.run(small_config(total_steps=6), tmp_path)
    for step in (4, 6):
        shutil.rmtree(tmp_path / "checkpoints" / str(step))
    pretrain.run(small_config(), tmp_path, traced=(2, 4))
    assert "--profile_steps 2,4" in caplog.text and "FIRST must be at least 3" in caplog.text
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("between", [(6, 8), (4, 9)])
def test_a_run_that_is_too_short_says_so(one_device, small_config, tmp_path, caplog, between):
    pretrain.run(small_config(), tmp_path, traced=between)
    (warning,) = [line for line in caplog.text.splitlines() if "--profile_steps" in line]
    assert f"{between[0]},{between[1]}" in warning and "step 6" in warning
    assert (tmp_path / "profile").exists() == (between == (4, 9))


def test_a_trace_that_is_cut_short_is_closed(tmp_path, caplog):
    trace = profile.Trace(tmp_path, (1, 3), 0, 5)
    trace.begin(1, ())
    trace.close()
    assert "cut short" in caplog.text and not (tmp_path / "profile" / "kernels.json").exists()
    with profile.trace(str(tmp_path / "other")):  # none is running any more
        pass
    assert list(tmp_path.glob("other/plugins/profile/*/*.xplane.pb"))


@pytest.mark.parametrize("text", ["", "3", "1,1", "0,2", "4,2", "-1,2", "1,2,3", "a,b", "1.5,3"])
def test_steps_that_are_no_range_are_refused_before_anything_is_made(text, small_config_file, tmp_path, capsys):
    arguments = ["pretrain", "--config", str(small_config_file), "--workdir", str(tmp_path / "run")]
    assert cli.main([*arguments, f"--profile_steps={text}"]) == 2
    assert not (tmp_path / "run").exists()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("qbheat: error")]
    assert "--profile_steps" in line
    with pytest.raises(UserError):
        profile.parse(text)


# A trace of two GPUs, as XLA writes it: lines of streams, and others that tell of the same time once more.
GPU = """
planes {{ id: 1 name: "/host:CPU" lines {{ id: 1 name: "python" events {{ metadata_id: 1 duration_ps: 9000000000 }} }}
  event_metadata {{ key: 1 value {{ id: 1 name: "train" }} }} }}
planes {{ id: 2 name: "/device:GPU:0" {lines} {names} }}
planes {{ id: 3 name: "/device:GPU:1" {lines} {names} }}
planes {{ id: 4 name: "/device:CUSTOM:Megascale Trace" }}
"""
NAMES = """
  event_metadata { key: 1 value { id: 1 name: "nvjet" } }
  event_metadata { key: 2 value { id: 2 name: "fusion_1" } }
  event_metadata { key: 3 value { id: 3 name: "jit_step" } }
"""
LINES = """
  lines { id: 1 name: "XLA Modules" events { metadata_id: 3 duration_ps: 8000000000 } }
  lines { id: 2 name: "Stream #13(Compute)"
    events { metadata_id: 1 offset_ps: 0 duration_ps: 2000000000 }
    events { metadata_id: 2 offset_ps: 3000000000 duration_ps: 1000000000 }
    events { metadata_id: 1 offset_ps: 5000000000 duration_ps: 2000000000 } }
  lines { id: 3 name: "Stream #14(Memcpy)" events { metadata_id: 2 duration_ps: 500000000 } }
"""


def test_kernels_of_gpus_are_those_of_their_streams(tmp_path):
    folder = tmp_path / "plugins" / "profile" / "now"
    folder.mkdir(parents=True)
    space = jax.profiler.ProfileData.text_proto_to_serialized_xspace(GPU.format(lines=LINES, names=NAMES))
    (folder / "host.xplane.pb").write_bytes(space)
    found = profile.longest(tmp_path, steps=2)
    assert found == {
        "devices": 2, "kernel_ms": 2.75, "launches": 2.0,
        "kernels": [{"ms": 2.0, "times": 1.0, "name": "nvjet"}, {"ms": 0.75, "times": 1.0, "name": "fusion_1"}],
    }  # fmt: skip
    assert len(profile.longest(tmp_path, steps=2, count=1)["kernels"]) == 1
    assert "2.75 ms of kernels in 2 launches a step" in profile.text(found)
