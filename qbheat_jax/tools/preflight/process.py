"""Compile a step in a child process, because XLA's GPU compiler aborts its process when it fails."""

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

LIMIT = 3600  # seconds; the largest model takes minutes
COMMAND = [sys.executable, "-P", "-m", "qbheat_jax.tools.preflight.child"]  # plus the folder of the next two files
REQUEST, ANSWER = "request.json", "compiled.json"
CUDNN = "pip install nvidia-cudnn-cu13 nvidia-cublas nvidia-cuda-runtime (no GPU is needed)"


class Compilation:
    """Context manager that compiles a step in a child process.

    Compilation starts with the `with` block. Call `result` inside it; its end kills the child process.

    Args:
      config: A checked config of a pre-training run.
      target: A `topology.Topology`.
      inference: As of `compile.build`.
    """

    def __init__(self, config, target, inference=False):
        request = {"config": config_lib.to_json(config), "topology": target.name, "inference": inference}
        self._request = json.dumps(request)

    def __enter__(self):
        self._folder = tempfile.TemporaryDirectory(prefix="qbheat-preflight-")
        folder = pathlib.Path(self._folder.name)
        (folder / REQUEST).write_text(self._request)
        # The child imports this package from the same place, and nothing from the working directory.
        paths = (str(pathlib.Path(qbheat_jax.__file__).parents[1]), os.environ.get("PYTHONPATH"))
        self._output = open(folder / "stderr", "w+", errors="replace")
        self._process = subprocess.Popen(
            [*COMMAND, str(folder)],
            env={**os.environ, "XLA_FLAGS": runtime.gpu_flags(), "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
        )
        return self

    def __exit__(self, *_):
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._output.close()
        self._folder.cleanup()

    def result(self):
        """Wait for the child process and return its `compile.Compiled`. A failure of the compiler is in its `error`."""
        try:
            code = self._process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            return compile.Compiled(error=f"compilation exceeded the limit of {LIMIT // 60} minutes")
        answer = pathlib.Path(self._folder.name) / ANSWER
        if code == 0 and answer.exists():
            return compile.Compiled(**json.loads(answer.read_text()))
        self._output.seek(0)
        output = self._output.read()
        log.debug("the compiling process ended with %d:\n%s", code, output)
        return compile.Compiled(error=explain(code, output))


def explain(code, output):
    """Return one line on why the child process ended.

    Args:
      code: Its exit code; -N for signal N.
      output: Its stdout and stderr.

    >>> explain(-6, "F1128 06:53:22.12 10748 tiling.cc:627] Check failed: a == b (256 vs. 32) \\n*** Check failure")
    "XLA's compiler aborted: Check failed: a == b (256 vs. 32) (tiling.cc:627)"
    """
    fatal = re.search(r"^F\d{4} .*?(\S+:\d+)\] (.*?)\s*$", output, re.MULTILINE)
    llvm = re.search(r"^LLVM ERROR: .*$", output, re.MULTILINE)
    lines = [line.strip() for line in output.splitlines() if line.strip() and not line.startswith(("***", "    @"))]
    if fatal:
        words = f"XLA's compiler aborted: {fatal[2]} ({fatal[1]})"
    elif llvm:
        words = f"XLA's compiler aborted: {llvm[0]}"
    elif code == -signal.SIGKILL:
        return "the compiler was killed by SIGKILL, probably because this machine has too little memory"
    elif code < 0:
        words = f"XLA's compiler was ended by {signal.Signals(-code).name}"
    else:
        words = f"the compiling process failed: {lines[-1] if lines else f'exit code {code}'}"
    return words + remedy(output)


def remedy(output):
    """Return a known remedy to append to an error message, or ""."""
    if re.search("triton", output, re.IGNORECASE):
        return "; XLA_FLAGS=--xla_gpu_enable_triton_gemm=false may avoid it, here and in training"
    if re.search("cudnn", output, re.IGNORECASE) and not topology.installed("nvidia-cudnn-cu13", "nvidia-cudnn-cu12"):
        return f"; cuDNN's attention needs an installed cuDNN: {CUDNN}"
    return ""
