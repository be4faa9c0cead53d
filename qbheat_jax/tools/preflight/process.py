"""Compile a step in a process of its own: where XLA's GPU compiler fails, it ends the process that it runs in."""

import json
import logging
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile

import qbheat_jax
from qbheat_jax import config as config_lib
from qbheat_jax.tools.preflight import compile, topology
from qbheat_jax.train import runtime

log = logging.getLogger("qbheat")

LIMIT = 3600  # seconds; the largest model here takes minutes
COMMAND = [sys.executable, "-P", "-m", "qbheat_jax.tools.preflight.child"]  # and the folder of these two files
REQUEST, ANSWER = "request.json", "compiled.json"
CUDNN = "pip install nvidia-cudnn-cu13 nvidia-cublas nvidia-cuda-runtime (no GPU is needed)"


class Compilation:
    """A step that is being compiled in another process, from the start of a `with` block to `result`, at most to its end.

    Args:
      config: A checked config of a pre-training run.
      where: A `topology.Topology`.
    """

    def __init__(self, config, where):
        self._request = json.dumps({"config": config_lib.to_json(config), "topology": where.name})

    def __enter__(self):
        self._folder = tempfile.TemporaryDirectory(prefix="qbheat-preflight-")
        folder = pathlib.Path(self._folder.name)
        (folder / REQUEST).write_text(self._request)
        # This very package, wherever it lies, and nothing that the working directory may hold.
        paths = (str(pathlib.Path(qbheat_jax.__file__).parents[1]), os.environ.get("PYTHONPATH"))
        self._said = open(folder / "stderr", "w+", errors="replace")
        self._process = subprocess.Popen(
            [*COMMAND, str(folder)],
            env={**os.environ, "XLA_FLAGS": runtime.gpu_flags(), "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            stdin=subprocess.DEVNULL,
            stdout=self._said,
            stderr=self._said,
        )
        return self

    def __exit__(self, *_):
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._said.close()
        self._folder.cleanup()

    def result(self):
        """Wait for the process -> `compile.Compiled`. A compiler that failed is a result too, told in `error`."""
        try:
            code = self._process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            return compile.Compiled(error=f"it was not compiled within {LIMIT // 60} minutes")
        answer = pathlib.Path(self._folder.name) / ANSWER
        if code == 0 and answer.exists():
            return compile.Compiled(**json.loads(answer.read_text()))
        self._said.seek(0)
        said = self._said.read()
        log.debug("the compiling process ended with %d:\n%s", code, said)
        return compile.Compiled(error=explain(code, said))


def explain(code, said):
    """Return one sentence on why a process that compiled has ended.

    Args:
      code: Its exit code, the negative number of a signal.
      said: What it wrote to stdout and stderr.

    >>> explain(-6, "F1128 06:53:22.12 10748 tiling.cc:627] Check failed: a == b (256 vs. 32) \\n*** Check failure")
    "XLA's compiler aborted: Check failed: a == b (256 vs. 32) (tiling.cc:627)"
    """
    fatal = re.search(r"^F\d{4} .*?(\S+:\d+)\] (.*?)\s*$", said, re.MULTILINE)
    llvm = re.search(r"^LLVM ERROR: .*$", said, re.MULTILINE)
    lines = [line.strip() for line in said.splitlines() if line.strip() and not line.startswith(("***", "    @"))]
    if fatal:
        words = f"XLA's compiler aborted: {fatal[2]} ({fatal[1]})"
    elif llvm:
        words = f"XLA's compiler aborted: {llvm[0]}"
    elif code == -signal.SIGKILL:
        return "the compiler was killed, most likely because this machine has too little memory for it"
    elif code < 0:
        words = f"XLA's compiler ended by {signal.Signals(-code).name}"
    else:
        words = f"the compiling process failed: {lines[-1] if lines else f'exit code {code}'}"
    return words + advice(said)


def advice(said):
    """Return what to try, to be appended to an error; "" where nothing is known to help."""
    if re.search("triton", said, re.IGNORECASE):
        return "; XLA_FLAGS=--xla_gpu_enable_triton_gemm=false may avoid it, here and in training"
    if re.search("cudnn", said, re.IGNORECASE) and not topology.installed("nvidia-cudnn-cu13", "nvidia-cudnn-cu12"):
        return f"; cuDNN's attention compiles only where cuDNN is installed: {CUDNN}"
    return ""
