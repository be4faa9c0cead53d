"""qbheat bench: figures from given timings, the order of runs, refusals, and tiny runs of every part."""

import json
import re
import sys

import pytest

from qbheat_jax import bench, cli
from qbheat_jax.bench import encoders, heat, options, photographs, table, timing, training
from qbheat_jax.errors import UserError


class Clock:
    """Time that passes only when something takes some."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def __call__(self):
        return self.now

    def taking(self, name, seconds, amount=1.0):
        """A candidate whose n-th call takes the n-th of `seconds`, then the last again and again."""
        left = list(seconds)

        def call():
            self.now += left.pop(0) if len(left) > 1 else left[0]
            self.log.append(name)

        return timing.Candidate(name, timing.repeated(call, self), amount)


def test_candidates_take_turns_and_every_second_round_goes_backwards():
    clock = Clock()
    timing.alternate([clock.taking(name, [1.0]) for name in "abc"], 3, seconds=0)
    assert "".join(clock.log) == "aabbcc" + "abc" + "cba" + "abc"


def test_a_run_has_as_many_calls_as_fill_its_seconds_and_the_warm_up_does_not_count():
    clock = Clock()
    slow, fast = clock.taking("slow", [90.0, 4.0]), clock.taking("fast", [50.0, 0.25])
    figures = timing.alternate([slow, fast], 2, seconds=1.0)
    assert figures["slow"] == {"calls": 1, "seconds": [4.0, 4.0]}
    assert figures["fast"] == {"calls": 4, "seconds": [0.25, 0.25]}


def test_rates_and_ratios():
    assert timing.rates([2.0, 4.0, 1.0], 16) == {"median": 8.0, "min": 4.0, "max": 16.0}
    # Round by round: of the medians alone it would be 1.
    assert timing.ratio([2.0, 4.0, 6.0], [1.0, 8.0, 4.0]) == {"median": 1.5, "min": 0.5, "max": 2.0}
    with pytest.raises(ValueError):
        timing.ratio([1.0], [1.0, 2.0])
    figures = {"a": {"seconds": [1.0, 5.0, 5.0]}, "b": {"seconds": [4.0, 4.0, 9.0]}}
    assert timing.fastest(figures, ["a", "b"]) == "b"


def test_a_peer_is_outrun_by_as_much_as_its_time_is_longer(monkeypatch):
    clock, times = Clock(), {"jax": 2.0, "torch eager": 5.0, "torch compile": 3.0}
    monkeypatch.setattr(timing, "repeated", lambda call: clock.taking("", [call]).run)
    o = options.Options(batch=6, size=32, rounds=3, seconds=0)
    made = encoders._against_peers("forward", "net", o, times, [])
    assert [row["rate"]["median"] for row in made["rows"]] == [3.0, 1.2, 2.0]
    (ratio,) = made["ratios"]
    assert ratio["median"] == 1.5 and ratio["name"].endswith("torch compile")
    assert encoders._against_peers("forward", "net", o, {"jax": 2.0}, [])["ratios"] == []


# --- Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, words",
    [
        (["everything"], "bench everything: it takes forward, step, heat, input or all"),
        (["forward", "--encoders", "resnet51"], "the nearest is resnet50"),
        (
            ["forward", "--size", "100", "--encoders", "resnet50"],
            "--size 100: resnet50 takes a multiple of its stride, 32",
        ),
        (["forward", "--dtype", "float16"], "--dtype float16: it takes float32 or bfloat16"),
        (["forward", "--peers", "fast"], "--peers fast: it takes none, or some of eager"),
        (["step", "--pretrain-size", "224", "--encoders", "vit_s"], "--pretrain-size 224: .*multiple of 4 cells"),
        (["step", "--batch", "1", "--size", "32", "--encoders", "resnet50"], "--batch 1: .*at least 2"),
        (["heat", "--cells", "12"], "--cells 12: it takes a multiple of 8"),
        (["input", "--images", "8"], "--images 8: .*--batch 16"),
        (["heat", "--rounds", "0"], "--rounds 0: it takes a number that is at least 1"),
        (["heat", "--seconds", "nan"], "--seconds nan"),
        (["heat", "--threads", "4097"], "--threads 4097"),
        (["heat", "--json", "/nowhere/at/all.json"], "there is no folder /nowhere/at"),
        (["heat", "--config.seed", "1"], "bench takes no config"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_compiled(argv, words, capsys, monkeypatch):
    for room, name in ((training.Step, "__init__"), (heat, "_call"), (photographs, "write")):
        monkeypatch.setattr(room, name, lambda *a: pytest.fail("something was begun"))
    assert cli.main(["bench", *argv]) == 2
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if line.startswith("qbheat: error: ")]
    assert re.search(words, line) and out == ""


def test_without_torch_it_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="missing .*pip install 'qbheat_jax\\[torch\\]', or pass --peers none"):
        options.check(options.Options("forward"))
    assert options.check(options.Options("forward", peers=())).threads >= 1


# --- Tiny runs -------------------------------------------------------------------------------------------------------

TINY = {"encoders": ("vit_micro",), "peers": ("eager", "channels-last"), "batch": 2, "size": 32, "pretrain_size": 32}
TINY |= {"classes": 4, "heat_batch": 2, "width": 4, "cells": 8, "images": 4, "rounds": 1, "seconds": 0.0}


def check_section(section, names):
    assert [row["name"] for row in section["rows"]] == list(names)
    for row in section["rows"]:
        assert len(row["seconds"]) == 1 and row["seconds"][0] > 0
        figure = row["rate"] or row["milliseconds"]
        assert 0 < figure["min"] <= figure["median"] <= figure["max"]


def test_forward_and_its_table(tmp_path, capsys):
    argv = ["forward", "--encoders", "vit_micro", "--peers", "eager", "--batch", 2, "--size", 32, "--rounds", 1]
    saved = tmp_path / "bench.json"
    assert cli.main([str(a) for a in ("bench", *argv, "--seconds", 0, "--json", saved)]) == 0
    out, result = capsys.readouterr().out, json.loads(saved.read_text())
    (section,) = result["sections"]
    check_section(section, ["jax", "torch eager"])
    assert section["peak_bytes"] > 1e7 and {"jax", "torch"} <= set(result["machine"]["versions"])
    (difference,) = re.findall(r"features differ by at most (\S+) of their scale", "\n".join(section["notes"]))
    assert float(difference) < 1e-5, "what is timed is the same computation"
    assert table.text(result) + "\n" == out
    lines = out.splitlines()
    (head,) = [n for n, line in enumerate(lines) if "| images/s |" in line]
    assert lines[head + 2].startswith("| jax |") and lines[head + 3].startswith("| torch eager |")
    assert len({line.count("|") for line in lines[head : head + 4]}) == 1
    assert f"threads of every framework: {options.available()};" in out


def test_step_trains_the_classifier_and_pretrains():
    sections = bench.run(options.Options("step", **TINY))["sections"]
    check_section(sections[0], ["jax", "torch eager", "torch channels-last"])
    check_section(sections[1], ["qbheat", "simmim"])
    cost = sections[1]["rows"][0]["seconds"][0] / sections[1]["rows"][1]["seconds"][0]
    assert sections[1]["ratios"][0]["median"] == pytest.approx(cost)


def test_heat(monkeypatch):
    monkeypatch.setattr(heat.heat, "PROPAGATORS", ("offset", "power"))
    monkeypatch.setattr(heat, "PLACEMENTS", (0, 4))
    sections = list(heat.run(options.Options("heat", **TINY)))
    check_section(sections[0], ["offset", "power"])
    check_section(sections[1], ["offset", "power"])
    for placements, cells in (sections[2:4], sections[4:6]):
        check_section(placements, ["1 drawn", "2 drawn"])
        check_section(cells, ["4 x 4 cells", "8 x 8 cells", "12 x 12 cells"])
        least, own = (row["seconds"][0] for row in cells["rows"][:2])
        assert cells["ratios"][0]["median"] == pytest.approx(4 * least / own), "a quarter of the cells"


def test_input():
    (section,) = bench.run(options.Options("input", **TINY))["sections"]
    check_section(section, ["floor: one loop, one thread", "tf.data pipeline", "device_cache"])
    floor, pipeline = (row["rate"]["median"] for row in section["rows"][:2])
    assert section["ratios"][0]["median"] == pytest.approx(pipeline / floor)


def test_jpegs_are_made_without_the_photographs_too(tmp_path, monkeypatch):
    def missing(name):
        raise UserError("not installed")

    monkeypatch.setattr(photographs.photos, "load", missing)
    assert "noise" in photographs.write(tmp_path, 3)
    sizes = [photographs.Image.open(path).size for path in sorted(tmp_path.iterdir())]
    assert len(sizes) == 3 and all(abs(w - 500) <= 20 and abs(h - 375) <= 20 for w, h in sizes)
