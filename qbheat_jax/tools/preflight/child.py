"""Child process of `process.Compilation`: compile the step that a request file describes, and write the answer."""

import dataclasses
import json
import pathlib
import sys
import traceback

import jax

from qbheat_jax import config as config_lib
from qbheat_jax.tools.preflight import compile, process, topology
from qbheat_jax.train.config_tables import PRETRAIN


def main(folder):
    """Read `process.REQUEST` from a folder, compile the step, and write `process.ANSWER` there."""
    folder = pathlib.Path(folder)
    request = json.loads((folder / process.REQUEST).read_text())
    target = topology.parse(request["topology"])
    topology.prepare(target)
    # jax cannot read cached programs back for devices that are not present.
    jax.config.update("jax_enable_compilation_cache", False)
    config = config_lib.from_json(request["config"], PRETRAIN)
    step = compile.build(config, topology.devices(target), inference=request["inference"])
    done = _compile(step.trace())
    (folder / process.ANSWER).write_text(json.dumps(dataclasses.asdict(done)))


def _compile(traced):
    try:
        return compile.compile(traced)
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
    if "tile sizes" not in message:
        return compile.Compiled(error=f"XLA's compiler failed: {message.splitlines()[0]}{process.remedy(message)}")
    # With a GPU, XLA times several tile sizes and drops those that fail. Without one it has a single guess.
    done = compile.compile(traced, {"xla_gpu_enable_triton_gemm": False})
    note = "XLA found no tile size for a Triton matmul, since it cannot time any here; all matmuls use cuBLAS instead"
    return dataclasses.replace(done, note=note)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except Exception as error:
        traceback.print_exc()
        sys.exit(f"{type(error).__name__}: {error}".splitlines()[0])  # the parent reports this last line
