"""Every encoder with every objective compiles its train step for an H100, one encoder a family for a v5e, and the rest too.

The programs are lowered from shapes, so neither a GPU nor a TPU is needed. Where XLA's compiler fails a check of its own it
ends the process that it runs in, so each worker compiles in a child, which is started again after that.
"""

import importlib.metadata
import importlib.util
import json
import os
import pathlib
import select
import subprocess
import sys

import pytest

from qbheat_jax.tools.preflight import topology
from qbheat_jax.tools.preflight.process import explain
from tests import compile_cells

ROOT = pathlib.Path(__file__).parents[1]
LIMIT = 300  # seconds a cell; each takes a few
MOST = 3 * 2**30  # bytes that a child may take before another takes its place

MISSING = {
    compile_cells.GPU: ""
    if topology.gpu_compiler()
    else "there is no wheel of XLA's GPU compiler, jax-cuda13-pjrt, here",
    compile_cells.TPU: ""
    if importlib.util.find_spec("libtpu")
    else "there is no wheel of the TPU's compiler, libtpu, here",
}


class Compiler:
    """A child of `tests.compile_cells`, started when it is needed."""

    def __init__(self, folder):
        self._kernels, self._log, self._process = folder / "kernels", folder / "stderr", None

    def compile(self, name):
        """The child's answer to a cell, {"programs", "bytes"} or {"error"}."""
        if self._process is None:
            self._start()
        self._process.stdin.write(f"{name}\n".encode())
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], LIMIT)
        line = self._process.stdout.readline() if ready else b""
        if not line:
            return {"error": self._stop() if ready else f"it took more than {LIMIT} s; {self._stop()}"}
        answer = json.loads(line)
        if answer["bytes"] > MOST:
            self.close()
        return answer

    def close(self):
        if self._process is not None:
            self._stop()

    def _start(self):
        # The flags of conftest.py are for CPUs, and jax could not read programs for devices that are not here back.
        env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        env |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
        command = [sys.executable, "-m", compile_cells.__name__, str(self._kernels)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )

    def _stop(self):
        """End the child -> why it had ended, in one line."""
        process, self._process = self._process, None
        if process.poll() is None:
            process.stdin.close()
        try:
            code = process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        process.stdout.close()
        said = self._log.read_text(errors="replace")
        return explain(code, said)


@pytest.fixture(scope="session")
def compiler(tmp_path_factory):
    made = Compiler(tmp_path_factory.mktemp("compile"))
    yield made
    made.close()


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.weekly] * (name in compile_cells.WEEKLY)) for name in compile_cells.CELLS],
)
def test_compiles(compiler, name):
    missing = MISSING[compile_cells.CELLS[name].target]
    if missing:
        pytest.skip(missing)
    answer = compiler.compile(name)
    assert "error" not in answer, answer["error"]
    assert answer["programs"] > 0
