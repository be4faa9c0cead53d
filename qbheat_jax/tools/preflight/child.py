"""The process that `process.Compilation` starts: compile what a folder asks for, and write the answer there."""

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
    """Read `process.REQUEST` in a folder, compile, and write `process.ANSWER`."""
    folder = pathlib.Path(folder)
    request = json.loads((folder / process.REQUEST).read_text())
    where = topology.parse(request["topology"])
    topology.prepare(where)
    # jax would keep programs for devices that are not here, and could not read them back.
    jax.config.update("jax_enable_compilation_cache", False)
    config = config_lib.from_json(request["config"], PRETRAIN)
    done = _compile(compile.build(config, topology.devices(where)).trace())
    (folder / process.ANSWER).write_text(json.dumps(dataclasses.asdict(done)))


def _compile(traced):
    try:
        return compile.compile(traced)
    except jax.errors.JaxRuntimeError as error:
        said = str(error)
    if "tile sizes" not in said:
        return compile.Compiled(error=f"XLA's compiler refused it: {said.splitlines()[0]}{process.advice(said)}")
    # On a GPU, XLA times several tiles and drops those that do not work. Without one it has a single guess.
    done = compile.compile(traced, {"xla_gpu_enable_triton_gemm": False})
    note = "XLA found no tiles for one of its Triton products without timing any, so cuBLAS has all products here"
    return dataclasses.replace(done, note=note)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except Exception as error:
        traceback.print_exc()
        sys.exit(f"{type(error).__name__}: {error}".splitlines()[0])  # the last line, which the parent tells
