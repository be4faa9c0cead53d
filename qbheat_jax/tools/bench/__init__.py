"""Benchmarks: the package against PyTorch, its methods against each other, its input pipeline against bare decoding.

Compared candidates run in turn in one process, with the same number of threads, shapes and dtypes.
"""

import dataclasses
import json
import pathlib

from qbheat_jax.errors import RUN_FAILED, writing
from qbheat_jax.tools.bench import machine, options


def run(requested, show=None):
    """Run the benchmarks.

    The result is shown and written after each section, so that an interrupted run keeps its measurements.

    Args:
      requested: An `options.Options`.
      show: Function of the result so far, called before the first section and after each; None shows nothing.

    Returns:
      The result, a JSON-ready dict for `table.text`. It is also written to the file `requested.json`, if set.

    Raises:
      UserError: The options cannot be run (raised before compilation), or the file cannot be written.
    """
    o = options.check(requested)
    parts = _parts(o)
    # Both must run before jax starts its backend.
    machine.limit_threads(o.threads)
    machine.share_memory(o)
    result = {"machine": machine.machine(o.threads), "options": dataclasses.asdict(o), "sections": []}
    if show:
        show(result)
    for part in parts:
        for section in part(o):
            result["sections"].append(section)
            _save(result, o.json)
            if show:
                show(result)
    return result


def _save(result, path):
    if path:
        with writing(f"--json {path}", RUN_FAILED):
            pathlib.Path(path).write_text(json.dumps(result, indent=2) + "\n")


def _parts(o):
    from qbheat_jax.tools.bench import encoders, heat_operator, inputs

    if "input" in o.parts:
        inputs.check()
    known = {"forward": encoders.forward, "step": encoders.step, "heat": heat_operator.run, "input": inputs.run}
    return [known[name] for name in o.parts]
