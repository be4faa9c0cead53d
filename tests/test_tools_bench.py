"""qbheat bench: figures from given timings, the order of runs, errors, and tiny runs of every part."""

import functools
import json
import re
import sys
import types
import weakref

import pytest

from qbheat_jax import cli
from qbheat_jax.errors import UserError
from qbheat_jax.tools import bench
from qbheat_jax.tools.bench import encoders, heat_operator, options, peers, photographs, table, timing, training
from qbheat_jax.tools.bench import machine as machine_lib
from qbheat_jax.train import runtime


class Clock:
    """A fake clock that only advances in calls."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def __call__(self):
        return self.now

    def taking(self, name, seconds, amount=1.0):
        """Return a candidate whose n-th call takes the n-th of `seconds`; the last one repeats."""
        left = list(seconds)

        def call():
            self.now += left.pop(0) if len(left) > 1 else left[0]
            self.log.append(name)

        return timing.Candidate(name, timing.repeated(call, clock=self), amount)


def test_candidates_take_turns_and_every_second_round_goes_backwards():
    clock = Clock()
    timing.alternate([clock.taking(name, [1.0]) for name in "abc"], 3, seconds=0)
    assert "".join(clock.log) == "aabbcc" + "aabbcc" + "ccbbaa" + "aabbcc"


def test_a_run_has_as_many_calls_as_fill_its_seconds_and_the_warm_up_does_not_count():
    clock = Clock()
    slow, fast = clock.taking("slow", [90.0, 4.0]), clock.taking("fast", [50.0, 0.25])
    figures = timing.alternate([slow, fast], 2, seconds=1.0)
    assert figures["slow"] == {"calls": 1, "seconds": [4.0, 4.0]}
    assert figures["fast"] == {"calls": 4, "seconds": [0.25, 0.25]}


def test_the_first_call_after_another_candidate_does_not_count():
    clock = Clock()
    candidates = [clock.taking("a", [9.0, 1.0, 7.0, 2.0, 8.0, 3.0]), clock.taking("b", [5.0])]
    assert timing.alternate(candidates, 2, seconds=0)["a"]["seconds"] == [2.0, 3.0]


class Device:
    """A fake device that runs calls in order: sending one takes 1 s, its work takes 3 s."""

    def __init__(self, clock):
        self.clock, self.free = clock, 0.0

    def call(self):
        self.clock.now += 1.0
        self.free = max(self.free, self.clock.now) + 3.0
        return self.free

    def wait(self, result):
        self.clock.log.append(result)
        self.clock.now = max(self.clock.now, result)


def test_calls_are_sent_ahead_and_the_last_is_waited_for():
    clock = Clock()
    device = Device(clock)
    run = timing.repeated(device.call, device.wait, ahead=True, clock=clock)
    assert run(5) == 1 + 5 * 3 and clock.log == [16.0]
    assert run(1) == 4 and run(2) == 7


def test_each_call_is_waited_for_where_nothing_is_sent_ahead():
    clock = Clock()
    device = Device(clock)
    assert timing.repeated(device.call, device.wait, clock=clock)(5) == 5 * 4 and len(clock.log) == 5


@pytest.mark.parametrize("backend, waits", [("cpu", 4), ("gpu", 1), ("tpu", 1)])
def test_only_a_cpu_is_waited_for_at_each_call(monkeypatch, backend, waits):
    monkeypatch.setattr(timing.jax, "default_backend", lambda: backend)
    seen = []
    assert timing.on_device(lambda: "result", seen.append)(4) >= 0 and seen == ["result"] * waits


def test_past_the_limit_no_candidate_is_begun_and_the_others_have_one_round():
    clock = Clock()
    limit = timing.Limit(10.0, clock)
    candidates = [clock.taking("a", [4.0, 1.0]), clock.taking("b", [6.0, 1.0]), clock.taking("c", [1.0])]
    figures = timing.alternate(candidates, 3, seconds=0, limit=limit)
    assert figures == {name: {"calls": 1, "seconds": [1.0]} for name in "ab"}
    assert clock.log == list("aabb" + "aabb") and limit.stopped
    assert len(limit.notes) == 2 and all("limit of 10 s" in note for note in limit.notes)
    assert "c is not timed" in limit.notes[0] and "1 of 3 rounds" in limit.notes[1]


def test_a_round_is_finished_past_the_limit():
    clock = Clock()
    limit = timing.Limit(9.0, clock)
    figures = timing.alternate([clock.taking(name, [1.0]) for name in "ab"], 5, seconds=0, limit=limit)
    assert [row["seconds"] for row in figures.values()] == [[1.0, 1.0]] * 2
    assert clock.now == 12.0 and "after 2 of 5 rounds" in limit.notes[0]


def test_without_reaching_a_limit_all_rounds_are_timed():
    for seconds in (0.0, 1000.0):
        clock = Clock()
        limit = timing.Limit(seconds, clock)
        figures = timing.alternate([clock.taking("a", [9.0])], 10, seconds=0, limit=limit)
        assert len(figures["a"]["seconds"]) == 10 and not limit.stopped and not limit.notes


def test_a_candidate_that_does_not_work_is_left_out():
    def fail(calls):
        raise timing.NotTimed("b does not work here")

    clock, limit = Clock(), timing.Limit()
    figures = timing.alternate([timing.Candidate("b", fail), clock.taking("a", [1.0])], 2, 0, limit)
    assert list(figures) == ["a"] and limit.notes == ["b does not work here"] and not limit.stopped


def test_a_lazy_candidate_is_made_once_in_its_first_run():
    made = []
    run = timing.lazy(lambda: made.append("made") or (lambda calls: float(calls)))
    assert made == [] and run(2) == 2.0 and run(3) == 3.0 and made == ["made"]


def test_rates_and_ratios():
    assert timing.rates([2.0, 4.0, 1.0], 16) == {"median": 8.0, "min": 4.0, "max": 16.0}
    # Round by round; the ratio of the medians would be 1.
    assert timing.ratio([2.0, 4.0, 6.0], [1.0, 8.0, 4.0]) == {"median": 1.5, "min": 0.5, "max": 2.0}
    with pytest.raises(ValueError):
        timing.ratio([1.0], [1.0, 2.0])
    figures = {"a": {"seconds": [1.0, 5.0, 5.0]}, "b": {"seconds": [4.0, 4.0, 9.0]}}
    assert timing.fastest(figures, ["a", "b"]) == "b"


def test_the_ratio_to_the_fastest_peer():
    clock, times = Clock(), {"jax": 2.0, "torch eager": 5.0, "torch compile": 3.0}
    runs = {name: clock.taking("", [seconds]).run for name, seconds in times.items()}
    o, limit = options.Options(batch=6, size=32, rounds=3, seconds=0), timing.Limit()
    made = encoders._against_peers("forward", "net", o, runs, limit)
    assert [row["rate"]["median"] for row in made["rows"]] == [3.0, 1.2, 2.0]
    (ratio,) = made["ratios"]
    assert ratio["median"] == 1.5 and ratio["name"].endswith("torch compile")
    assert encoders._against_peers("forward", "net", o, {"jax": runs["jax"]}, limit)["ratios"] == []


# --- Errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, words",
    [
        (["everything"], "bench everything .*forward, step, heat, input or all"),
        (["forward", "--encoders", "resnet51"], "resnet51.*resnet50"),
        (["forward", "--size", "100", "--encoders", "resnet50"], "--size 100 .*resnet50 .*32"),
        (["forward", "--dtype", "float16"], "--dtype float16 .*float32 or bfloat16"),
        (["forward", "--peers", "fast"], "--peers fast .*none.*eager"),
        (["forward", "--encoders", "convnext_t"], "--encoders convnext_t .*--peers none"),
        (["forward", "--encoders", "vit_g", "--size", "28"], "--encoders vit_g .*--peers none"),
        (["step", "--pretrain-size", "224", "--encoders", "vit_s"], "--pretrain-size 224: .*4 cells"),
        (["step", "--batch", "1", "--size", "32", "--encoders", "resnet50"], "--batch 1 .*at least 2"),
        (["heat", "--cells", "12"], "--cells 12 .*multiple of 8"),
        (["input", "--images", "8"], "--images 8 .*--batch 16"),
        (["heat", "--rounds", "0"], "--rounds 0 .*at least 1"),
        (["heat", "--seconds", "nan"], "--seconds nan"),
        (["heat", "--limit", "-1"], "--limit -1.0 .*at least 0"),
        (["heat", "--threads", "4097"], "--threads 4097"),
        (["heat", "--json", "/nowhere/at/all.json"], "--json /nowhere/at/all.json .*/nowhere/at "),
        (["heat", "--config.seed", "1"], "--config.seed.*bench"),
    ],
)
def test_impossible_options_are_refused_before_compilation(argv, words, capsys, monkeypatch):
    for room, name in ((training.Step, "__init__"), (heat_operator, "_call"), (photographs, "write")):
        monkeypatch.setattr(room, name, lambda *a: pytest.fail("a benchmark started"))
    assert cli.main(["bench", *argv]) == 2
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if line.startswith("qbheat: error: ")]
    assert re.search(words, line) and out == ""


def test_a_missing_torch_is_named_with_a_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="--peers .*torch.*pip install 'qbheat_jax\\[torch\\]'.*--peers none"):
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
    (difference,) = re.findall(r"torch eager: features differ .*?(\d\S*e[-+]\d+)", "\n".join(section["notes"]))
    assert float(difference) < 1e-5, "both sides must compute the same features"
    assert table.text(result) + "\n" == out
    lines = out.splitlines()
    (head,) = [n for n, line in enumerate(lines) if "| images/s |" in line]
    assert lines[head + 2].startswith("| jax |") and lines[head + 3].startswith("| torch eager |")
    assert len({line.count("|") for line in lines[head : head + 4]}) == 1
    assert f"threads of every framework: {runtime.cores()};" in out


def test_step_trains_the_classifier_and_pretrains(monkeypatch):
    small = {"decoder.width": 16, "decoder.depth": 0, "decoder.heads": 2}  # the decoder takes longest to compile
    common = options._common
    monkeypatch.setattr(options, "_common", lambda o, name: common(o, name) | small)
    o = options.Options("step", **{**TINY, "encoders": ("pebble",), "peers": ()})
    classifier, pretraining = bench.run(o)["sections"]
    check_section(classifier, ["jax"])
    check_section(pretraining, ["qbheat", "simmim"])
    cost = pretraining["rows"][0]["seconds"][0] / pretraining["rows"][1]["seconds"][0]
    assert pretraining["ratios"][0]["median"] == pytest.approx(cost)


def test_a_section_past_its_limit_keeps_its_figures_and_exit_code_0(tmp_path, capsys, monkeypatch):
    clock = Clock()

    def call(*arguments):
        clock.now += 40.0
        return lambda: None

    monkeypatch.setattr(heat_operator, "_call", call)
    monkeypatch.setattr(timing, "Limit", functools.partial(timing.Limit, clock=clock))
    saved = tmp_path / "bench.json"
    argv = ("bench", "heat", "--limit", 100, "--cells", 8, "--rounds", 1, "--seconds", 0, "--json", saved)
    assert cli.main([str(a) for a in argv]) == 0
    sections, out = json.loads(saved.read_text())["sections"], capsys.readouterr().out
    check_section(sections[0], ["offset", "power", "exp"])
    assert sections[0]["limit_reached"] and len(sections[0]["ratios"]) == 2
    notes = sections[0]["notes"]
    assert len(notes) == 3 and all("limit of 100 s" in note and f"* {note}" in out.splitlines() for note in notes)
    assert "spectral is not timed" in notes[0]
    # Each section has its own limit.
    assert not sections[2]["limit_reached"] and len(sections[2]["rows"]) == 2


def test_a_section_frees_its_models_before_the_next(monkeypatch):
    pytest.importorskip("torch")
    from qbheat_jax.tools.bench.peers import running

    held, left = [], []

    class Peer(running.Peer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            held.append(weakref.ref(self.model))

    class Step(training.Step):
        def __init__(self, *arguments):
            left.append(sum(reference() is not None for reference in held))
            super().__init__(*arguments)
            held.append(weakref.ref(self))

    monkeypatch.setattr(running, "Peer", Peer)
    monkeypatch.setattr(training, "Step", Step)
    o = options.Options("forward", **{**TINY, "encoders": ("vit_micro", "vit_micro")}, threads=1)
    assert len(list(encoders.forward(o))) == 2
    assert len(held) == 6 and left == [0, 0]


@pytest.mark.parametrize(
    "given, peers, what, share",
    [
        ({}, ("eager",), "step", "0.45"),
        ({}, ("eager",), "all", "0.45"),
        ({}, (), "step", None),
        ({}, ("eager",), "heat", None),
        ({"XLA_CLIENT_MEM_FRACTION": ".3"}, ("eager",), "step", ".3"),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".3"}, ("eager",), "step", None),
        ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, ("eager",), "forward", None),
        ({"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}, ("eager",), "forward", None),
    ],
)
def test_jax_leaves_memory_to_the_peers_unless_the_environment_sets_it(given, peers, what, share):
    environment = dict(given)
    machine_lib.share_memory(options.Options(what, peers=peers), environment)
    assert environment.get("XLA_CLIENT_MEM_FRACTION") == share
    assert {**given, **environment} == environment


def test_the_head_of_the_table_names_calls_sent_ahead_and_the_memory():
    machine = machine_lib.machine(1)
    assert machine["sends_ahead"] is False and machine["jax_memory_fraction"] == ""
    machine |= {"sends_ahead": True, "jax_memory_fraction": "0.45"}
    out = table.newest({"machine": machine, "options": {"what": "step", "rounds": 1}, "sections": []})
    assert "send all calls" in out and "0.45 of the GPU's memory" in out


def test_the_memory_is_shared_before_jax_starts_its_backend(monkeypatch):
    monkeypatch.delenv("XLA_CLIENT_MEM_FRACTION", raising=False)
    done = []
    monkeypatch.setattr(machine_lib, "share_memory", lambda o: done.append("shared"))
    monkeypatch.setattr(machine_lib, "machine", lambda threads: done.append("asked"))
    monkeypatch.setattr(bench, "_parts", lambda o: [])
    bench.run(options.Options("heat"))
    assert done == ["shared", "asked"]


def test_a_compiler_that_fails_is_a_note(monkeypatch):
    pytest.importorskip("torch")
    from qbheat_jax.tools.bench.peers import running

    class Peer:
        def __init__(self, model, way, *rest):
            self.way, self.wait = way, lambda result: None

    def make(peer):
        return lambda: 1 / (peer.way != "compile")

    monkeypatch.setattr(running, "Peer", Peer)
    monkeypatch.setattr(peers, "build", lambda *a: None)
    monkeypatch.setattr(peers, "load", lambda *a: None)
    objective = types.SimpleNamespace(encoder=None)
    runs = encoders._peers(options.Options("step"), "net", objective, {}, make)
    made = encoders._against_peers("step", "net", options.Options(rounds=1, seconds=0.0), runs, timing.Limit())
    assert [row["name"] for row in made["rows"]] == ["torch eager", "torch channels-last"]
    (note,) = made["notes"]
    assert "torch compile" in note and "ZeroDivisionError: division by zero" in note
    assert made["ratios"] == [] and not made["limit_reached"]


def test_heat_compares_propagators_placements_and_cells(monkeypatch):
    asked = []

    def call(o, propagator, cells, drawn, backward):
        asked.append((propagator, cells, len(drawn), backward))
        return lambda: None

    monkeypatch.setattr(heat_operator, "_call", call)
    sections = list(heat_operator.run(options.Options("heat", **TINY)))
    names = ["offset", "power", "exp", "spectral", "autoregressive", "cosine"]
    for section, backward in zip(sections[:2], (False, True)):
        check_section(section, names)
        assert all((name, 8, 5, backward) in asked for name in names)
    for name, placements, cells in zip(names, sections[2::2], sections[3::2], strict=True):
        check_section(placements, ["1 drawn", "5 drawn"])
        check_section(cells, ["4 x 4 cells", "8 x 8 cells", "12 x 12 cells"])
        assert {(name, 8, 1, True), (name, 4, 5, True), (name, 12, 5, True)} <= set(asked)
        least, own = (row["seconds"][0] for row in cells["rows"][:2])
        assert cells["ratios"][0]["median"] == pytest.approx(4 * least / own), "a quarter of the cells"


def test_heat_goes_forward_and_backward():
    filled, (params, visible) = heat_operator._call(options.Options("heat", **TINY), "offset", 8, (0, 4), True)()
    assert filled.shape == (2, 8, 8, 4) and visible.shape == (2, 4, 4, 4)
    assert set(params) == {"x+", "x-", "y+", "y-"} and all(float(abs(g).max()) > 0 for g in params.values())


def test_input():
    (section,) = bench.run(options.Options("input", **TINY))["sections"]
    check_section(section, ["floor: one loop, one thread", "tf.data pipeline", "device_cache"])
    floor, pipeline = (row["rate"]["median"] for row in section["rows"][:2])
    assert section["ratios"][0]["median"] == pytest.approx(pipeline / floor)


def test_jpegs_are_also_made_without_the_photographs(tmp_path, monkeypatch):
    def missing(name):
        raise UserError("not installed")

    monkeypatch.setattr(photographs.photos, "load", missing)
    assert "noise" in photographs.write(tmp_path, 3)
    sizes = [photographs.Image.open(path).size for path in sorted(tmp_path.iterdir())]
    assert len(sizes) == 3 and all(abs(w - 500) <= 20 and abs(h - 375) <= 20 for w, h in sizes)
