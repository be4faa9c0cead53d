"""Preflight: counts against closed forms, verdicts of the TPU compiler, and errors before compilation."""

import functools
import importlib.util
import json
import time

import jax
import jax.numpy as jnp
import pytest

from qbheat_jax import cli
from qbheat_jax.errors import UserError
from qbheat_jax.models import registry, vheat
from qbheat_jax.tools import preflight
from qbheat_jax.tools.preflight import (
    bounds,
    chips,
    compile,
    hlo,
    matmul_flops,
    min_traffic,
    search,
    topology,
    warnings,
)
from qbheat_jax.tools.preflight import text as text_lib

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU's compiler is not installed: pip install 'qbheat_jax[tpu]' (its wheels are for Linux on x86-64)",
)
V5E = topology.parse("v5e:2x4")
VIT = {"encoder.name": "vit_micro", "dtype": "bfloat16"}


def on(name, config):
    where = topology.parse(name)
    topology.prepare(where)
    return preflight.check(config, where, topology.devices(where))


# --- Counts ----------------------------------------------------------------------------------------------------------


def vit_matmul_flops(images, cells, pixels, width, depth, classes, inference=False):
    """Return the matmul FLOPs of a ViT classifier's training step: forward, and gradients of inputs and weights.

    The images have no gradient, so the patch embedding counts twice and all else three times; at inference once.
    """
    patches = 2 * cells * pixels * width
    block = 2 * cells * width * (3 * width + width + 4 * width + 4 * width) + 2 * 2 * cells * cells * width
    rest = depth * block + 2 * width * classes
    return images * (patches + rest if inference else 2 * patches + 3 * rest)


def test_matmul_flops_of_a_vit(small_config):
    config = small_config({**VIT, "objective": "supervised", "head.classes": 10})
    step = compile.build(config, jax.devices()[:4])
    counted = matmul_flops.by_type(step.trace().jaxpr)
    assert sum(counted.values()) == pytest.approx(vit_matmul_flops(16, 16, 8 * 8 * 3, 16, 1, 10), rel=0.02)
    assert counted["bfloat16"] > 0.9 * sum(counted.values())


def test_inference_is_the_forward_pass_of_the_weights_alone(small_config):
    config = small_config({**VIT, "objective": "supervised", "head.classes": 10})
    step = compile.build(config, jax.devices()[:4], inference=True)
    counted = sum(matmul_flops.by_type(step.trace().jaxpr).values())
    assert counted == pytest.approx(vit_matmul_flops(16, 16, 8 * 8 * 3, 16, 1, 10, inference=True), rel=0.02)
    assert step.parameters == compile.build(config, jax.devices()[:4]).parameters
    assert step.min_traffic_bytes() == step.argument_bytes() == 4 * step.parameters + 4 * 32 * 32 * 3 + 4


def test_inference_of_a_folded_encoder(small_config, monkeypatch):
    entry = registry.Entry(vheat.VHeat, {"dims": (8, 16), "depths": (1, 1)}, {8: {}}, registry._VHEAT)
    monkeypatch.setitem(registry.ENCODERS, "vheat_micro", entry)

    def flops(**fields):
        config = small_config({"encoder.name": "vheat_micro", "objective": "supervised", "head.classes": 10, **fields})
        step = compile.build(config, jax.devices()[:4], inference=True)
        return sum(matmul_flops.by_type(step.trace().jaxpr).values())

    # to_k of 8 x 8 and 4 x 4 frequencies, once for all images
    assert flops() - flops(**{"encoder.folded": True}) == 2 * (8**2 * 8**2 + 4**2 * 16**2)
    with pytest.raises(UserError):
        compile.build(small_config({"encoder.name": "vheat_micro", "encoder.folded": True}), jax.devices()[:4])


def test_matmul_flops_count_each_iteration_of_a_loop():
    def looped(x):
        return jax.lax.scan(lambda x, _: (x @ x, None), x, length=7)[0]

    assert matmul_flops.by_type(jax.make_jaxpr(looped)(jax.numpy.zeros((4, 4)))) == {"float32": 7 * 2 * 4**3}


def test_parameters_and_argument_bytes_of_a_vit(small_config):
    """The counts by hand: an encoder of one block, a classifier, and AdamW's two moments and step count."""
    config = small_config({**VIT, "objective": "supervised", "head.classes": 10})
    width = 16
    block = 12 * width**2 + (3 + 1 + 4 + 1) * width + 4 * width
    parameters = (8 * 8 * 3 + 1) * width + block + 2 * width + (width + 1) * 10
    step = compile.build(config, jax.devices()[:4])
    assert step.parameters == parameters
    images = 4 * (32 * 32 * 3 + 4 + 4 + 1)  # per device: pixels, quarter, label, mask
    assert step.argument_bytes() == pytest.approx(3 * 4 * parameters + images, abs=16)


def test_fsdp_splits_the_state(small_config):
    whole, split = (
        compile.build(small_config({"encoder.name": "pebble", "mesh.fsdp": n, "decoder.width": 256}), jax.devices())
        for n in (1, 8)
    )
    assert whole.parameters == split.parameters
    assert split.state_bytes() < 0.25 * whole.state_bytes()
    lines = warnings.of_step(split, split.trace(), {"bfloat16": 1}, V5E)
    assert not any("mesh.fsdp" in line for line in lines)


PROGRAM = """HloModule jit_step, is_scheduled=true

%body (p: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %all-gather.1 = f32[32,128]{1,0:T(8,128)} all-gather(%x), replica_groups=[4,4]<=[16], dimensions={0}
  %gathered = f32[8,128]{1,0:T(8,128)} fusion(%all-gather.1), kind=kLoop, calls=%sliced
  ROOT %t = (s32[], f32[8,128]{1,0:T(8,128)}) tuple(%i, %gathered)
}

%sliced (a: f32[32,128]) -> f32[8,128] {
  %a = f32[32,128]{1,0:T(8,128)} parameter(0)
  ROOT %s = f32[8,128]{1,0:T(8,128)} slice(%a), slice={[0:8], [0:128]}
}

%condition (c: (s32[], f32[8,128])) -> pred[] {
  %c = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %n = s32[]{:T(128)} get-tuple-element(%c), index=0
  %limit = s32[]{:T(128)} constant(5)
  ROOT %less = pred[]{:T(512)} compare(%n, %limit), direction=LT
}

%all-reduce-scatter.2 (b: f32[32,128]) -> f32[8,128] {
  %b = f32[32,128]{1,0:T(8,128)} parameter(0)
  %all-reduce.9 = f32[32,128]{1,0:T(8,128)} all-reduce(%b), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %d = f32[8,128]{1,0:T(8,128)} dynamic-slice(%all-reduce.9), dynamic_slice_sizes={8,128}
}

ENTRY %main (arg: f32[8,128], big: f32[32,128]) -> f32[8,128] {
  %arg = f32[8,128]{1,0:T(8,128)} parameter(0)
  %big = f32[32,128]{1,0:T(8,128)} parameter(1)
  %thin = f32[32,3]{1,0:T(8,128)} slice(%big), slice={[0:32], [0:3]}
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[], f32[8,128]{1,0:T(8,128)}) tuple(%zero, %arg)
  %while = (s32[], f32[8,128]{1,0:T(8,128)}) while(%start), condition=%condition, body=%body
  %looped = f32[8,128]{1,0:T(8,128)} get-tuple-element(%while), index=1
  %scattered = f32[8,128]{1,0:T(8,128)S(1)} fusion(%big), kind=kCustom, calls=%all-reduce-scatter.2
  %permute-start = (f32[8,128]{1,0}, f32[8,128]{1,0}) collective-permute-start(%looped), source_target_pairs={{0,1}}
  %permute-done = f32[8,128]{1,0:T(8,128)} collective-permute-done(%permute-start)
  %alone = f32[8,128]{1,0:T(8,128)} all-reduce(%permute-done), replica_groups={{0},{1}}, to_apply=%add
  ROOT %sum = f32[8,128]{1,0:T(8,128)} all-reduce(%alone), replica_groups=mesh['a'=4,'b'=4] {'a','b'}, to_apply=%add
}
"""
BLOCK = 8 * 128 * 4  # bytes


def test_collectives_by_kind_with_loops_and_groups():
    module = hlo.Module(PROGRAM, 16)
    assert module.unknown_loops() == 0
    assert module.collectives() == {
        "all-gather": hlo.Collective(5, 5 * 4 * BLOCK, 5 * 4 * BLOCK * 3 / 4),
        "reduce-scatter": hlo.Collective(1, 4 * BLOCK, 4 * BLOCK * 3 / 4),
        "collective-permute": hlo.Collective(1, BLOCK, BLOCK),
        "all-reduce": hlo.Collective(1, BLOCK, 2 * BLOCK * 15 / 16),
    }


def test_bytes_in_hbm_count_slices_loops_and_tiles():
    module = hlo.Module(PROGRAM, 16)
    thin = 2 * 32 * 3 * 4  # a slice is read and written
    loop = 5 * ((1 + 4) * BLOCK + 2 * BLOCK)  # all-gather; then a slice of it
    rest = 4 * BLOCK + 2 * BLOCK + 2 * 2 * BLOCK  # moved on chip; permuted; two all-reduces
    moved, padding = module.traffic()
    assert moved - padding == thin + loop + rest
    assert padding == 2 * 32 * (128 - 3) * 4
    array, _ = module.most_padded()
    assert array.shape == (32, 3) and array.padded == 32 * 128 * 4


@pytest.mark.parametrize(
    "dtype, layout, nbytes, padded",
    [
        ("f32", "1,0:T(8,128)", 4 * 30, 4 * 16 * 128),
        ("bf16", "0,1:T(8,128)(2,1)", 2 * 30, 2 * 8 * 128),  # the first dimension is the last in memory
        ("pred", "1,0", 30, 30),
        ("s4", "", 15, 15),
        ("f8e4m3fn", "", 30, 30),
        ("c64", "", 240, 240),
        ("token", "", 0, 0),
    ],
)
def test_bytes_of_an_array(dtype, layout, nbytes, padded):
    array = hlo.Array(dtype, (10, 3), layout)
    assert (array.bytes, array.padded) == (nbytes, padded)


def test_a_gather_that_became_a_loop_is_found():
    text = PROGRAM.replace("body=%body", 'body=%body, metadata={op_name="jit(step)/jvp(vmap())/gather"}')
    assert hlo.Module(text.replace("constant(5)", "constant(64)"), 16).serial_gathers() == [
        (64, "jit(step)/jvp(vmap())/gather")
    ]
    assert hlo.Module(PROGRAM.replace("direction=LT", "direction=NE"), 16).unknown_loops() == 1


# --- Chips, bounds, search -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", chips.CHIPS)
def test_chips_are_plausible(name):
    """A chip does 50 to 600 operations per byte of HBM traffic, and HBM is 2 to 16 times as fast as the links."""
    chip = chips.CHIPS[name]
    assert 50 < chip.flops / chip.hbm_bandwidth < 600
    assert 2 < chip.hbm_bandwidth / chip.links < 16
    assert 0.004 < chip.hbm / chip.hbm_bandwidth < 0.1
    assert not chip.tpu or chip.max_chips >= 256


def test_the_largest_floor_binds_and_bounds_follow():
    chip = chips.Chip(flops=100.0, hbm=1, hbm_bandwidth=10.0, links=1.0)
    floors = bounds.floors(chip, arithmetic=100.0, bytes_accessed=40.0, sent=2.0)
    assert floors == {"arithmetic": 1.0, "memory": 4.0, "interconnect": 2.0}
    upper = bounds.upper(floors, images_per_chip=8)
    assert upper["binds"] == "memory" and upper["mfu_at_most"] == 0.25
    assert upper["images_per_second_per_chip_at_most"] == 2.0


@pytest.mark.parametrize("most", [8, 100, 256, 1000, 5000])
def test_search_finds_the_largest_with_few_calls(most):
    calls = []

    def fits(n):
        calls.append(n)
        return n <= most

    best = search.largest(fits, 256, 8)
    assert best <= most and best % 8 == 0 and most - best <= max(8, most / 8) and len(calls) <= 9


def test_search_gives_up():
    assert search.largest(lambda n: False, 64, 8) == 0


# --- Least traffic ---------------------------------------------------------------------------------------------------


def test_the_gradient_needs_inputs_and_outputs_of_matmuls():
    batch, width, hidden, out = 5, 3, 7, 2
    x = jnp.zeros((batch, width))
    params = jnp.zeros((width, hidden)), jnp.zeros((hidden, out))

    def loss(params, x, dtype=jnp.float32, inner=lambda f: f):
        first, second = (w.astype(dtype) for w in params)
        y = inner(lambda x: jnp.tanh(2.0 * (x.astype(dtype) @ first)) @ second)(x)
        return (y.astype(jnp.float32) ** 2).sum(), None

    def with_a_form_for_cpus(f):
        return lambda x: jax.lax.platform_dependent(x, cpu=lambda x: f(x @ jnp.eye(width)), default=f)

    # The product x w1, its tanh, and the result; x itself is an argument.
    numbers = batch * (2 * hidden + out)
    assert min_traffic.activations(loss, params, x) == 4 * numbers
    assert min_traffic.activations(functools.partial(loss, inner=jax.jit), params, x) == 4 * numbers
    assert min_traffic.activations(functools.partial(loss, dtype=jnp.bfloat16), params, x) == 2 * numbers
    # Of several variants for platforms, the default counts.
    assert min_traffic.activations(functools.partial(loss, inner=with_a_form_for_cpus), params, x) == 4 * numbers
    # Rematerialised values are not stored.
    assert min_traffic.activations(functools.partial(loss, inner=jax.checkpoint), params, x) == 4 * batch * out


def test_a_part_is_named_by_its_modules():
    assert hlo.part("jit(step)/transpose(jvp(ViT))/block11/fc1/dot_general") == "ViT/block*/fc*"
    assert hlo.part("jit(step)/jvp(ViT)/norm/mul") == "ViT/norm"
    assert hlo.part("state.params['encoder']['block0']['fc1']['kernel']") == "state" and hlo.part("") == ""


# --- Verdicts --------------------------------------------------------------------------------------------------------


@needs_libtpu
@pytest.mark.parametrize("encoder", ["vit_micro", pytest.param("former_micro", marks=pytest.mark.weekly)])
def test_a_small_model_fits_a_tpu(small_config, encoder):
    got = on("v5e:2x2", small_config({"encoder.name": encoder, "dtype": "bfloat16", "batch_size": 64}))
    assert got["fits"] is True and got["reason"] == "" and got["devices"] == got["chips"] == 4
    assert got["memory"]["argument"] >= got["argument_bytes"]  # tiles are padded
    assert got["collectives"]["all-reduce"]["bytes"] >= 2 * got["parameters"]  # gradients of at least two bytes each
    assert 0 < got["bounds"]["mfu_at_most"] < 1
    assert set(got["floors"]) == {"arithmetic", "memory", "interconnect"}
    assert got["bounds"]["step_seconds_at_least"] == max(got["floors"].values())
    assert "optimal_seconds" not in json.dumps(got)
    assert sum(got["bytes_by_part"].values()) == got["bytes_accessed"]
    assert got["least_bytes"] > 2 * got["state_bytes"]  # a model this small stays on chip and moves less than that
    words = text_lib.text(got)
    assert "verdict                fits" in words and "upper bounds" in words
    assert f"{got['bytes_accessed'] / got['least_bytes']:.2f} times the least traffic" in words


@needs_libtpu
def test_a_batch_that_does_not_fit_is_refused_with_its_sizes(small_config):
    config = small_config({"encoder.name": "pebble", "image_size": 256, "batch_size": 2**15})
    got = on("v5e:2x2", config)
    assert got["fits"] is False and got["bounds"] is None
    assert got["reason"].startswith("RESOURCE_EXHAUSTED") and "15.75G" in got["reason"]
    assert "DOES NOT FIT" in text_lib.text(got)


@needs_libtpu
def test_two_cores_of_a_v4_are_one_device():
    where = topology.parse("v4:2x2x1")
    topology.prepare(where)
    assert len(topology.devices(where)) == where.devices == 4


@needs_libtpu
@pytest.mark.parametrize("name, devices", [("v5e:1x1", 1), ("tpu7x:2x2x1", 8), ("v6e:16x16", 256)])
def test_topologies_have_the_devices_that_the_table_says(name, devices):
    where = topology.parse(name)
    topology.prepare(where)
    assert len(topology.devices(where)) == where.devices == devices


def test_a_cpu_has_no_verdict(small_config):
    got = on("cpu:4", small_config({"encoder.name": "pebble"}))
    assert got["fits"] is None and got["bounds"] is None
    assert got["memory"]["argument"] == pytest.approx(got["argument_bytes"], rel=0.01)  # unused labels are dropped
    assert got["collectives"]["all-reduce"]["bytes"] > 4 * got["parameters"]
    assert "not known" in text_lib.text(got)


# --- The command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "topology_name, overrides, words",
    [
        ("v9:4x4", {}, ["--topology v9:4x4", "'v9'", "v5e"]),
        ("v5e", {}, ["--topology v5e ", "2 side", "v5e:4x4"]),
        ("v4:4x4", {}, ["--topology v4:4x4 ", "3 side", "v4:4x4x8"]),
        ("v5e:3x3", {}, ["--topology v5e:3x3", "even", "v5e:4x4"]),
        ("v5e:32x32", {}, ["--topology v5e:32x32", "1024", "256"]),
        ("cpu:8", {"batch_size": "12"}, ["--topology cpu:8", "batch_size=12", "8"]),
        ("cpu:8", {"mesh.data": "16"}, ["--topology cpu:8", "mesh.data=16", "8 devices"]),
        ("cpu:8", {"objective": "supervised"}, ["--topology cpu:8", "head.classes=0", "--config.head.classes 1000"]),
        ("cpu:8", {"batch_sise": "8"}, ["batch_sise", "batch_size"]),
    ],
)
def test_impossible_requests_are_refused_at_once(small_config_file, capsys, topology_name, overrides, words):
    argv = ["preflight", "--config", str(small_config_file), "--topology", topology_name]
    started = time.perf_counter()
    code = cli.main(argv + [f"--config.{k}={v}" for k, v in overrides.items()])
    assert code == 2 and time.perf_counter() - started < 5
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("qbheat: error: ") and all(word in error for word in words), error


def test_a_missing_compiler_is_named(small_config_file, capsys, monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    assert cli.main(["preflight", "--config", str(small_config_file), "--topology", "v5e:4x4"]) == 2
    assert "pip install 'qbheat_jax[tpu]'" in capsys.readouterr().err


def test_find_batch_is_not_for_cpus(small_config_file, capsys):
    argv = ["preflight", "--config", str(small_config_file), "--topology", "cpu:8", "--find-batch"]
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert "--find-batch" in error and "cpu:8" in error and "v5e:4x4" in error


def test_find_batch_reports_what_it_tried(small_config):
    """A fixed limit replaces the compiler, so that only the search is tested."""

    def check(config):
        fits = config.batch_size <= 100
        reason = "" if fits else "too large"
        return {"batch_size": config.batch_size, "fits": fits, "reason": reason, "error": "", "compile_seconds": 1.0}

    got = preflight._search(small_config({"encoder.name": "pebble"}), V5E, jax.devices(), check)
    assert 88 <= got["batch_size"] <= 100 and got["batch_size"] % 8 == 0
    assert [row["fits"] for row in got["search"] if row["batch_size"] > 100] and got["search"][0]["batch_size"] == 16


def test_the_result_is_printed_and_written(small_config_file, tmp_path, capsys):
    argv = ["preflight", "--config", str(small_config_file), "--topology", "cpu:8", "--workdir", str(tmp_path / "w")]
    assert cli.main([*argv, "--config.encoder.name", "pebble"]) == 0
    written = json.loads((tmp_path / "w" / "preflight.json").read_text())
    out = capsys.readouterr().out
    assert written["topology"] == "cpu:8" and f"{written['parameters']:,}" in out


def test_inference_is_printed_and_written(small_config_file, tmp_path, capsys):
    argv = ["preflight", "--config", str(small_config_file), "--topology", "cpu:8", "--workdir", str(tmp_path / "w")]
    assert cli.main([*argv, "--config.encoder.name", "pebble", "--inference"]) == 0
    written = json.loads((tmp_path / "w" / "preflight.json").read_text())
    assert written["program"] == "forward pass" and written["parameters"] == 8 * 8 * 3 * 16 + 2 * 16
    assert "forward pass" in capsys.readouterr().out and written["compile_seconds"] > 0 and not written["error"]


def test_a_warning_names_a_state_that_changes_its_types(small_config):
    step = compile.build(small_config({"encoder.name": "pebble"}), jax.devices())
    traced = step.trace()
    assert not any("second step" in line for line in warnings.of_step(step, traced, {"bfloat16": 1}, V5E))

    class Changed:
        out_info = (jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "float16"), step.state),)

    assert any("second step" in line for line in warnings.of_step(step, Changed, {"bfloat16": 1}, V5E))
    assert any("float32" in line for line in warnings.of_step(step, traced, {"float32": 1}, V5E))
    assert warnings.of_step(step, traced, {"float32": 1}, topology.parse("cpu:8")) == []


def test_topology_errors_are_user_errors():
    with pytest.raises(UserError, match="--topology cpu:0 .*cpu:8"):
        topology.parse("cpu:0")
