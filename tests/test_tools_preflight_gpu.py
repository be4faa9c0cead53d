"""Preflight of GPUs: kernels and bytes against hand counts, and XLA's GPU compiler and its failures without a GPU."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qbheat_jax import cli
from qbheat_jax.errors import UserError
from qbheat_jax.tools import preflight
from qbheat_jax.tools.preflight import chips, hlo, process, topology, warnings
from qbheat_jax.tools.preflight import text as text_lib
from qbheat_jax.train import runtime

TESTS = Path(__file__).parent
needs_gpu_compiler = pytest.mark.skipif(
    not topology.gpu_compiler(),
    reason="XLA's GPU compiler is not installed: pip install 'qbheat_jax[gpu-compiler]' (its wheels are for Linux)",
)
CLASSIFIER = {"objective": "supervised", "head.classes": 10, "dtype": "bfloat16"}  # compiles fastest
# The real child process, with the tests' encoders registered.
CHILD = (
    f"import sys; sys.path.insert(0, {str(TESTS)!r}); import conftest; from qbheat_jax.tools.preflight import child; "
)
GPUS = [name for name, chip in chips.CHIPS.items() if chip.gpu]


def on(name, config):
    where = topology.parse(name)
    topology.prepare(where)
    return preflight.check(config, where, topology.devices(where))


@pytest.fixture
def child(monkeypatch):
    """Return a function that replaces the child process's code; by default it is the real one with the tests' encoders."""

    def make(code="child.main(sys.argv[1])", before=CHILD):
        monkeypatch.setattr(process, "COMMAND", [sys.executable, "-P", "-c", before + code])

    return make


def answers(**compiled):
    """Return the code of a child process that writes the given `compile.Compiled` fields as its answer."""
    return (
        "import json, pathlib, sys; folder = pathlib.Path(sys.argv[1]); "
        f"(folder / {process.ANSWER!r}).write_text({json.dumps(compiled)!r})"
    )


# --- Kernels and bytes -----------------------------------------------------------------------------------------------

PROGRAM = """HloModule jit_step, num_partitions=2

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%gemm_fusion (p: f32[32,32], q: f32[32,32]) -> f32[32,32] {
  %p = f32[32,32]{1,0} parameter(0)
  %q = f32[32,32]{1,0} parameter(1)
  ROOT %dot.1 = f32[32,32]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%fused_double (p: f32[32,32]) -> f32[32,32] {
  %p = f32[32,32]{1,0} parameter(0)
  ROOT %twice = f32[32,32]{1,0} add(%p, %p)
}

%fused_slice (p: f32[32,32]) -> f32[4,32] {
  %p = f32[32,32]{1,0} parameter(0)
  ROOT %rows = f32[4,32]{1,0} slice(%p), slice={[0:4], [0:32]}
}

%command_buffer (p: f32[32,32]) -> (f32[32,32], f32[32,32]) {
  %p = f32[32,32]{1,0} parameter(0)
  %gemm_fusion_dot = f32[32,32]{1,0} fusion(%p, %p), kind=kCustom, calls=%gemm_fusion, backend_config={"kind":"__triton"}
  %matmul = (f32[32,32]{1,0}, s8[4194304]{0}) custom-call(%p, %gemm_fusion_dot), custom_call_target="__cublas$lt$matmul"
  %product = f32[32,32]{1,0} get-tuple-element(%matmul), index=0
  ROOT %both = (f32[32,32]{1,0}, f32[32,32]{1,0}) tuple(%gemm_fusion_dot, %product)
}

%body (b: (s32[], f32[32,32])) -> (s32[], f32[32,32]) {
  %b = (s32[], f32[32,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %x.1 = f32[32,32]{1,0} get-tuple-element(%b), index=1
  %loop_fusion = f32[32,32]{1,0} fusion(%x.1), kind=kLoop, calls=%fused_double
  ROOT %next = (s32[], f32[32,32]{1,0}) tuple(%i, %loop_fusion)
}

%until (c: (s32[], f32[32,32])) -> pred[] {
  %c = (s32[], f32[32,32]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

%scattered (p: f32[32,32]) -> f32[16,32] {
  %p = f32[32,32]{1,0} parameter(0)
  ROOT %rs = f32[16,32]{1,0} reduce-scatter(%p), replica_groups={{0,1}}, dimensions={0}, to_apply=%add
}

ENTRY %main (arg: f32[32,32]) -> f32[32,32] {
  %arg = f32[32,32]{1,0} parameter(0)
  %call = (f32[32,32]{1,0}, f32[32,32]{1,0}) call(%arg), to_apply=%command_buffer
  %first = f32[32,32]{1,0} get-tuple-element(%call), index=0
  %flat = f32[1024]{0} bitcast(%first)
  %zero = s32[] constant(0)
  %start = (s32[], f32[32,32]{1,0}) tuple(%zero, %first)
  %while = (s32[], f32[32,32]) while(%start), condition=%until, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %looped = f32[32,32]{1,0} get-tuple-element(%while), index=1
  %conv = (f32[32,32]{1,0}, u8[64]{0}) custom-call(%looped, %arg), custom_call_target="__cudnn$convForward"
  %image = f32[32,32]{1,0} get-tuple-element(%conv), index=0
  %fmha = (f32[32,32]{1,0}, f32[32]{0}, u8[0]{0}) custom-call(%image, %image, %image), custom_call_target="__cudnn$fmhaSoftmax"
  %heads = f32[32,32]{1,0} get-tuple-element(%fmha), index=0
  %pallas = f32[32,32]{1,0} custom-call(%heads), custom_call_target="__gpu$xla.gpu.triton"
  %rows = f32[4,32]{1,0} fusion(%pallas), kind=kLoop, calls=%fused_slice
  %ag = ((f32[32,32], f32[4,32]), (f32[64,32], f32[8,32])) all-gather-start(%pallas, %rows), replica_groups=[1,2]<=[2]
  %gathered = (f32[64,32], f32[8,32]) all-gather-done(%ag)
  %rs-start = ((f32[32,32]{1,0}), f32[16,32]{1,0}) async-start(%pallas), calls=%scattered
  %rs-done = f32[16,32]{1,0} async-done(%rs-start)
  ROOT %copy = f32[32,32]{1,0} copy(%pallas)
}
"""
MAP = 32 * 32 * 4  # bytes
ROW = 32 * 4


def test_kernels_are_counted_by_kind_in_command_buffers_and_loops():
    module = hlo.Module(PROGRAM, 2)
    assert module.launches() == {
        "fusions": 5 + 1, "collectives": 2, "Triton products": 1, "cuBLAS products": 1, "cuDNN convolutions": 1,
        "cuDNN attention": 1, "Pallas kernels": 1, "copies": 1,
    }  # fmt: skip


def test_bytes_exclude_scratch_memory_and_instructions_without_a_launch():
    module = hlo.Module(PROGRAM, 2)
    products = 2 * (2 + 1) * MAP  # each reads two and writes one, without cuBLAS's scratch of 4 MiB
    loop = 5 * 2 * MAP
    convolution, attention, pallas = 3 * MAP, 4 * MAP + ROW, 2 * MAP
    rows = 2 * 4 * ROW
    gathered = (MAP + 4 * ROW) + (2 * MAP + 8 * ROW)
    scattered = MAP + MAP // 2
    copy = 2 * MAP
    moved = products + loop + convolution + attention + pallas + rows + gathered + scattered + copy
    assert module.traffic() == (moved, 0)
    assert module.collectives()["all-gather"] == hlo.Collective(1, 2 * MAP + 8 * ROW, MAP + 4 * ROW)
    assert module.collectives()["reduce-scatter"] == hlo.Collective(1, MAP, MAP / 2)


def test_warnings_name_a_gathered_batch_and_short_kernels():
    text = PROGRAM.replace("[64,32]", "[1048576,32]").replace("f32[32,32]", "f32[524288,32]")
    module, where = hlo.Module(text, 2), topology.parse("h100:2")
    assert any("all-gathers bring" in line for line in warnings.of_program(module, {}, where, {"data": 2, "fsdp": 1}))
    assert not any("bring" in line for line in warnings.of_program(module, {}, where, {"data": 1, "fsdp": 2}))
    lines = warnings.of_program(module, {"memory": 14e-6}, where, {"data": 1, "fsdp": 2})
    assert any("14 kernels in 0.01 ms" in line and "1 us each" in line for line in lines)


def test_a_warning_counts_recomputed_results():
    module = hlo.Module(PROGRAM.replace("%conv", "%conv.remat2"), 2)
    assert module.recomputed() == (1, 3 * MAP) and hlo.Module(PROGRAM, 2).recomputed() == (0, 0)
    lines = warnings.of_program(module, {}, topology.parse("h100:2"), {"data": 1, "fsdp": 2})
    assert len(lines) == 1 and "recomputes 1 results" in lines[0]


# --- Topologies ------------------------------------------------------------------------------------------------------


def test_named_gpus_have_a_compiler_and_plain_ones_do_not():
    assert topology.parse("b200:8").gpu and not topology.parse("gpu:8").gpu and not topology.parse("v5e:2x2").gpu
    with pytest.raises(UserError, match="--topology h100:12 .*nodes of 8.*h100:16"):
        topology.parse("h100:12")


@pytest.mark.parametrize("name", GPUS)
def test_registers_and_caches_are_plausible(name):
    gpu = chips.CHIPS[name].gpu
    # A core multiplies 1024 (A100) to 4096 pairs of bfloat16 per clock.
    pairs = chips.CHIPS[name].flops / 2 / gpu.cores / (gpu.clock * 1e9)
    assert 900 < pairs < 5000
    assert gpu.shared_block < gpu.shared < 2**18 and 32 * 2**20 < gpu.l2 < 2**28


@needs_gpu_compiler
@pytest.mark.parametrize("name, nodes", [("a100:1", 1), ("h100:8", 1), ("h200:16", 2), ("b200:24", 3)])
def test_devices_are_those_of_the_nodes(name, nodes):
    where = topology.parse(name)
    topology.prepare(where)
    devices = topology.devices(where)
    assert len(devices) == where.devices and len({d.process_index for d in devices}) == nodes
    assert devices[0].device_kind == where.chip.gpu.name


def test_a_missing_compiler_is_named(small_config_file, capsys, monkeypatch):
    def version(package):
        raise topology.importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(topology.importlib.metadata, "version", version)
    assert cli.main(["preflight", "--config", str(small_config_file), "--topology", "h100:8"]) == 2
    assert "pip install 'qbheat_jax[gpu-compiler]'" in capsys.readouterr().err


def test_the_report_of_a_plain_gpu_names_a_known_model(small_config):
    got = on("gpu:4", small_config())
    assert got["fits"] is None and got["launches"] is None and got["bounds"] is None
    assert "such as h100:8" in text_lib.text(got)


# --- Verdicts --------------------------------------------------------------------------------------------------------


@needs_gpu_compiler
def test_a_small_model_fits_a_gpu(small_config, child):
    child()
    got = on("h100:2", small_config(CLASSIFIER))
    assert got["error"] == "" and got["fits"] is True and got["compiler"] == topology.gpu_compiler()
    assert got["memory"]["argument"] == pytest.approx(got["argument_bytes"], rel=0.02)
    assert got["needed_bytes"] >= got["memory"]["argument"] + got["memory"]["temp"]
    # Gradients of bfloat16 matmuls are summed in bfloat16, those of norms in float32.
    assert got["collectives"]["all-reduce"]["bytes"] >= 2 * got["parameters"]
    assert got["launches"]["fusions"] > 10 and got["launches"]["collectives"] >= 1
    assert sum(got["bytes_by_part"].values()) == got["bytes_accessed"] > got["state_bytes"]
    assert set(got["floors"]) == {"arithmetic", "memory", "interconnect"}
    assert got["floors"]["arithmetic"] == pytest.approx(got["product_flops"] / 2 / 989e12)
    words = text_lib.text(got)
    assert "kernels a step" in words and "over NVLink" in words and "tile padding" not in words
    assert "time" in got["not_known"] and "network" not in got["not_known"]


@needs_gpu_compiler
def test_a_batch_that_does_not_fit_is_refused_with_its_sizes(small_config, child):
    child()
    got = on("h100:2", small_config({**CLASSIFIER, "image_size": 256, "batch_size": 2**18}))
    assert got["fits"] is False and got["bounds"] is None and got["needed_bytes"] > got["hbm_bytes"]
    assert "79.1 GiB" in got["reason"] and "DOES NOT FIT" in text_lib.text(got)


@needs_gpu_compiler
@pytest.mark.parametrize(
    "share, fits, advised", [(0.5, True, ""), (0.8, True, "=0.82"), (0.949, True, "=0.95"), (0.96, False, "")]
)
def test_a_warning_advises_a_memory_fraction_above_the_default(small_config, child, share, fits, advised):
    size = int(share * chips.CHIPS["h200"].hbm)
    memory = {"argument": 0, "output": 7, "alias": 7, "temp": size, "generated_code": 0}
    child(answers(text=PROGRAM, memory=memory), before="")
    got = on("h200:1", small_config())
    assert got["fits"] is fits and got["needed_bytes"] == size
    assert [re.search("=.*", w)[0] for w in got["warnings"] if "MEM_FRACTION" in w] == [advised] * bool(advised)


@needs_gpu_compiler
def test_find_batch_is_for_gpus_too(small_config, child):
    """The replaced child process reports 8 GiB per image."""
    code = f"""
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
config = json.loads(json.loads((folder / {process.REQUEST!r}).read_text())["config"])
memory = dict(argument=0, output=0, alias=0, temp=config["batch_size"] << 33, generated_code=0)
(folder / {process.ANSWER!r}).write_text(json.dumps(dict(text={PROGRAM!r}, memory=memory, seconds=1.0)))
"""
    child(code, before="")
    where = topology.parse("h100:8")
    devices = topology.devices(where)
    check = functools.partial(preflight.check, target=where, devices=devices)
    got = preflight._search(small_config({**CLASSIFIER, "batch_size": 8}), where, devices, check)
    assert got["batch_size"] == 8 and got["fits"] is True
    assert [(row["batch_size"], row["fits"]) for row in got["search"]] == [(8, True), (16, False)]


@needs_gpu_compiler
@pytest.mark.parametrize(
    "overrides, words",
    [
        ({"image_size": "131072"}, ["GiB", "batch_size"]),
        ({"decoder.width": "262144"}, ["GiB", "mesh.fsdp"]),
        ({"mesh.data": "16"}, ["mesh.data=16", "8 devices"]),
    ],
)
def test_impossible_requests_are_refused_before_compilation(small_config_file, capsys, child, overrides, words):
    child("raise SystemExit('started')", before="")
    argv = ["preflight", "--config", str(small_config_file), "--topology", "h100:8"]
    assert cli.main(argv + [f"--config.{k}={v}" for k, v in overrides.items()]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("qbheat: error: --topology h100:8: ") and all(word in error for word in words), error


# --- Failures --------------------------------------------------------------------------------------------------------

ABORT = (
    "F1128 06:53:22.128906 10748 tiling.cc:627] Check failed: a == b (256 vs. 32) \n*** Check failure stack trace: ***"
)


@needs_gpu_compiler
@pytest.mark.parametrize("more", [[], ["--find-batch"]])
def test_an_abort_is_reported_in_one_line(small_config_file, tmp_path, capsys, child, more):
    child(f"import os; os.write(2, {ABORT.encode()!r}); os.abort()", before="")
    argv = ["preflight", "--config", str(small_config_file), "--topology", "h100:2", "--json", str(tmp_path / "r.json")]
    assert cli.main([*argv, *more]) == 1
    captured = capsys.readouterr()
    last = captured.err.strip().splitlines()[-1]
    assert last.startswith("qbheat: error: ") and "Traceback" not in captured.err
    assert "h100:2" in last and last.endswith("Check failed: a == b (256 vs. 32) (tiling.cc:627)")
    if not more:
        got = json.loads((tmp_path / "r.json").read_text())
        assert got["fits"] is None and got["bounds"] is None and got["error"] in last
        assert "DOES NOT COMPILE: XLA's" in captured.out


# The gradient of a strided slice before a matmul, next to a matmul of the whole array. XLA fuses it into a Triton matmul.
STRIDED = """
import jax, jax.numpy as jnp, sys
from qbheat_jax.tools.preflight import topology
where = topology.parse("h100:1")
topology.prepare(where)
jax.config.update("jax_enable_compilation_cache", False)
device = jax.sharding.SingleDeviceSharding(topology.devices(where)[0])

def product(x, matrix):
    return (x.reshape(-1, 32) @ matrix).reshape(*x.shape[:3], -1)

def loss(first, second, third, x):
    x = product(x, first).astype("float32")
    x = (x - x.mean((0, 1, 2))) * jax.lax.rsqrt((x * x).mean((0, 1, 2)) + 1e-5)
    x = jax.nn.relu(x.astype("bfloat16"))
    return sum((y * y).astype("float32").sum() for y in (product(x[:, ::2, ::2], second), product(x, third)))

shapes = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=device) for s in ((32, 32), (32, 64), (32, 32), (2, 8, 8, 32))]
jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes).compile()
sys.exit("it compiles")
"""


@needs_gpu_compiler
def test_a_real_abort_of_xla_is_reported(small_config, child, monkeypatch):
    # XLA aborts at Triton matmuls, which are off by default here.
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_triton_gemm=true")
    child(STRIDED, before="")
    error = on("h100:1", small_config(CLASSIFIER))["error"]
    if error.endswith("it compiles"):
        pytest.skip("this version of XLA compiles the strided matmul at which others abort")
    assert re.search(r"Check failed: .* \(triton.*\.cc:\d+\); XLA_FLAGS=--xla_gpu_enable_triton_gemm=false", error)


@pytest.mark.parametrize(
    "code, output, words",
    [
        (-9, "", "SIGKILL"),
        (-11, "", "SIGSEGV"),
        (-6, "LLVM ERROR: Cannot select: x", "LLVM ERROR: Cannot select: x"),
        (1, "Traceback ...\nValueError: no such thing\n", "ValueError: no such thing"),
        (0, "", "exit code 0"),
        (-6, ABORT.replace("tiling.cc", "triton_tiling.cc"), "XLA_FLAGS=--xla_gpu_enable_triton_gemm=false"),
    ],
)
def test_each_end_of_the_compiler_is_explained(code, output, words):
    assert words in process.explain(code, output) and "\n" not in process.explain(code, output)


def test_a_hanging_compiler_is_killed(small_config, child, monkeypatch):
    monkeypatch.setattr(process, "LIMIT", 0.2)
    child("import time; time.sleep(60)", before="")
    with process.Compilation(small_config(), topology.parse("h100:1")) as running:
        assert "limit" in running.result().error
        assert running._process.poll() is None
    assert running._process.poll() is not None


def test_a_missing_cudnn_is_named(small_config, monkeypatch):
    monkeypatch.setattr(topology, "installed", lambda *names: "")
    assert "pip install nvidia-cudnn-cu13 nvidia-cublas" in process.explain(1, "RuntimeError: cuDNN not found.")

    class Step:
        @staticmethod
        def trace():
            raise RuntimeError("cuDNN not found.")

    with pytest.raises(UserError, match="--topology h100:1: cuDNN not found.; .* pip install") as raised:
        preflight._trace(Step, topology.parse("h100:1"))
    assert raised.value.exit_code == 1


# --- A machine without a GPU -----------------------------------------------------------------------------------------


def test_the_compiler_alone_makes_no_command_complain():
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    argv = [sys.executable, "-m", "qbheat_jax", "doctor"]
    got = subprocess.run(argv, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert got.returncode == 0 and "jax-cuda13-pjrt" in got.stdout
    assert "Traceback" not in got.stderr and "plugin" not in got.stderr


@pytest.mark.parametrize(
    "vendors, driver, quiet", [(set(), False, True), ({runtime.NVIDIA}, False, False), (set(), True, False)]
)
def test_a_plugin_that_should_find_a_gpu_is_heard(monkeypatch, caplog, vendors, driver, quiet):
    logger = runtime.logging.getLogger("jax._src.xla_bridge")
    monkeypatch.setattr(logger, "filters", [])
    monkeypatch.setattr(runtime, "vendors", lambda: vendors)
    monkeypatch.setattr(runtime, "_has_cuda_driver", lambda: driver)
    runtime.expect_no_gpu()
    logger.error("Jax plugin configuration error: Exception when calling %s.initialize()", "jax_plugins.xla_cuda13")
    logger.error("another error")
    assert len(caplog.records) == 2 - quiet
