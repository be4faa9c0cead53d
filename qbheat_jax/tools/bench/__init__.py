"""Benchmarks: the package against PyTorch, its methods against each other, its input against the least that it costs.

All that are compared run in one process, in turn, on the same number of threads, with the same shapes and types.
"""

import dataclasses
import json
import pathlib

from qbheat_jax.errors import RUN_FAILED, writing
from qbheat_jax.tools.bench import machine, options


def run(asked, show=None):
    """options.Options -> the result, a dict of plain data for `table.text`; written to the file `asked.json` where set.

    show: called with the result so far, without sections at first and then after each; the file is written as often, so
    that what was measured is not lost with a run that is cut off. Raises UserError for what cannot be, before anything is
    compiled.
    """
    o = options.check(asked)
    parts = _parts(o)
    # Both before jax starts.
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
