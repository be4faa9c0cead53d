"""Preflight: a config's real train step, compiled by the target's own compiler before a chip is rented."""

import json
import logging
import math

from etils import epath

from qbheat_jax import config as config_lib
from qbheat_jax.errors import RUN_FAILED, UserError, writing
from qbheat_jax.tools.preflight import bounds, compile, hlo, matmul_flops, process, search, topology, warnings
from qbheat_jax.tools.preflight.chips import NODE
from qbheat_jax.train import flops

log = logging.getLogger("qbheat")

GIB = 2**30
# Of a GPU's memory: what jax takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise, and what it can take at most. The
# rest is CUDA's, NCCL's and cuDNN's own.
PREALLOCATED, LARGEST = 0.75, 0.95


def run(path, overrides, target, *, find_batch=False, save=None):
    """The result for a config file on a topology, as `check` gives it; written to the file `save` where it is set.

    With `find_batch` the result is of the largest batch that fits, and `search` says what was tried. Raises UserError
    for what cannot be, before anything is compiled.
    """
    where = topology.parse(target)
    config = config_lib.load(path, overrides)
    topology.prepare(where)
    devices = topology.devices(where)
    name = epath.Path(path).name
    result = _search(config, where, devices, name) if find_batch else check(config, where, devices, name)
    if save:
        with writing(save, RUN_FAILED):
            save = epath.Path(save)
            save.parent.mkdir(parents=True, exist_ok=True)
            save.write_text(json.dumps(result, indent=2) + "\n")
    return result


def check(config, where, devices, name="config"):
    """All that is found out about one config -> dict of plain numbers and words; what is not known is None.

    Bytes and seconds are of one device and one step, FLOPs of the whole batch. Raises UserError where config and
    topology do not go together.
    """
    step = build(config, where, devices)
    if not where.gpu:
        return _check(step, where, devices, name, compile.compile)
    with process.Compilation(config, where) as running:  # beside what is counted here
        return _check(step, where, devices, name, lambda _: running.result())


def _check(step, where, devices, name, compiler):
    """`check` of a step. compiler: function of the traced step -> compile.Compiled."""
    config = step.config
    log.info("%d parameters; tracing the step", step.parameters)
    traced = _trace(step, where)
    plain = _without_recomputing(step, traced, where, devices)
    by_type = matmul_flops.by_type(plain.jaxpr)
    product_flops = sum(by_type.values())
    result = {
        "config": name,
        "topology": where.name,
        "chips": where.chips,
        "devices": len(devices),
        "mesh": dict(step.mesh.shape),
        "batch_size": config.batch_size,
        "images_per_device": config.batch_size // (step.mesh.shape["data"] * step.mesh.shape["fsdp"]),
        "parameters": step.parameters,
        "state_bytes": step.state_bytes(),
        "argument_bytes": step.argument_bytes(),
        "least_bytes": step.least_bytes(),
        "hbm_bytes": _hbm(where),
        "product_flops": product_flops,
        "product_flops_by_type": by_type,
        "flops": flops.count(plain.jaxpr),
        **dict.fromkeys(("fits", "reason", "error", "compile_seconds", "compiler", "memory", "needed_bytes")),
        **dict.fromkeys(
            ("bytes_accessed", "bytes_padding", "bytes_counted", "bytes_by_part", "collectives", "launches")
        ),
        **dict.fromkeys(("floors", "bounds")),
        "not_known": _not_known(where),
        "warnings": warnings.of_step(step, traced, by_type, where),
    }
    figures, module = {"arithmetic": product_flops / len(devices)}, None
    if where.chip or where.kind == "cpu":
        module = _compile(result, traced, where, len(devices), compiler)
    if where.chip and module:
        figures["bytes_accessed"] = result["bytes_accessed"]
        figures["sent"] = sum(c["sent"] for c in result["collectives"].values())
    if where.chip and result["fits"] is not False and not result["error"]:
        result["floors"] = bounds.floors(where.chip, **figures)
        result["bounds"] = bounds.upper(result["floors"], config.batch_size / where.chips)
    if module:
        result["warnings"] += warnings.of_program(module, result["floors"] or {}, where, result["mesh"])
    return result


def _trace(step, where):
    try:
        return step.trace()
    except RuntimeError as error:  # jax asks cuDNN for its version
        remedy = process.advice(str(error))
        if not remedy:
            raise
        raise UserError(f"--topology {where.name}: {error}{remedy}", exit_code=RUN_FAILED) from error


def _not_known(where):
    """What the result cannot say for this kind of topology, in words."""
    if where.kind == "cpu":
        return "what this machine's memory and arithmetic allow"
    if where.gpu:
        words = (
            "time, since nothing was run. XLA chose algorithms without timing them: on a card it may take others, and "
            "then kernels, their scratch memory and bytes differ"
        )
        nodes = ". All GPUs count as joined by NVLink, though a slower network joins nodes" * (where.devices > NODE)
        return words + nodes
    return "" if where.tpu else "which GPU it is: take one of those that are known, such as h100:8"


def _compile(result, traced, where, devices, compiler):
    """Compile and add what is found to the result -> the program's hlo.Module, None where there is no program."""
    log.info("compiling for %s, which takes minutes for a large model", where.name)
    done = compiler(traced)
    result["compile_seconds"], result["compiler"] = done.seconds, _compiler(where)
    result["fits"], result["reason"], result["error"] = _fits(done, where), done.refusal, done.error
    if done.note:
        result["warnings"].append(done.note)
    if not done.text:
        return None
    result["memory"] = done.memory
    if where.gpu:
        _add_need(result, where)
    module = hlo.Module(done.text, devices)
    result["collectives"] = {
        kind: {"count": c.count, "bytes": c.bytes, "sent": round(c.sent)} for kind, c in module.collectives().items()
    }
    if where.chip:
        moved, padding = module.traffic()
        result["bytes_accessed"], result["bytes_padding"] = moved - padding, padding
        result["bytes_by_part"] = module.traffic_by_part()
        result["bytes_counted"] = "counted on the compiled HLO, loops as often as they run"
    if where.gpu:
        result["bytes_counted"] += ", as if the L2 cache kept nothing"
        result["launches"] = module.launches()
    return module


def _fits(done, where):
    """The compiler's verdict; None where it gives none, as a GPU's gives none of what it compiled."""
    if done.refusal:
        return False
    return True if where.tpu and done.text else None


def _add_need(result, where):
    """Add what a GPU needs for a step and whether it has that: XLA compiles for GPUs what does not fit, too."""
    m, hbm = result["memory"], where.chip.hbm
    need = m["argument"] + m["output"] - m["alias"] + m["temp"] + m["generated_code"]
    result["needed_bytes"], result["fits"] = need, need <= LARGEST * hbm
    words = f"a step needs {need / GIB:.1f} GiB"
    if not result["fits"]:
        result["reason"] = f"{words}, and jax can have {LARGEST * hbm / GIB:.1f} of a GPU's {hbm / GIB:.1f} at most"
    elif need > PREALLOCATED * hbm:
        result["warnings"].append(
            f"{words}, and jax takes {PREALLOCATED * hbm / GIB:.1f} unless told: set "
            f"XLA_PYTHON_CLIENT_MEM_FRACTION={min(LARGEST, math.ceil(need / hbm * 50 + 1) / 50):.2f}"
        )


def _compiler(where):
    if where.gpu:
        return topology.gpu_compiler()
    package = "libtpu" if where.tpu else "jaxlib"
    return topology.installed(package) or package  # TPU_LIBRARY_PATH names one that pip knows nothing of


def _hbm(where):
    return where.chip.hbm // where.chip.devices if where.chip else None


def build(config, where, devices):
    """The step of a config on a topology; UserError names the topology and says what would work."""
    try:
        return compile.build(config, devices, _hbm(where) or math.inf)
    except UserError as error:
        raise UserError(f"--topology {where.name}: {error}") from error


def _without_recomputing(step, traced, where, devices):
    """The trace that model FLOPs are counted on: what is computed again to save memory is no work of the model."""
    if step.config.remat == "none" and not where.chip:
        return traced
    plain = config_lib.resolve({**config_lib.flatten(step.config.to_dict()), "remat": "none"})
    return compile.build(plain, devices, plain=True).trace()


def _search(config, where, devices, name):
    tried, results = [], {}

    def fits(batch_size):
        changed = config_lib.resolve({**config_lib.flatten(config.to_dict()), "batch_size": batch_size})
        try:
            found = check(changed, where, devices, name)
            row = {key: found[key] for key in ("batch_size", "fits", "reason", "compile_seconds")}
            row["reason"] = row["reason"] or found["error"]
        except UserError as error:
            found = None
            row = {"batch_size": batch_size, "fits": False, "reason": str(error), "compile_seconds": 0.0}
        if found and found["error"] and not results:  # which no smaller batch is likely to cure
            raise UserError(f"--topology {where.name}: {found['error']}", exit_code=RUN_FAILED)
        log.info("batch %d: %s (%.0f s)", batch_size, row["reason"] or "fits", row["compile_seconds"])
        tried.append(row)
        if row["fits"]:
            results[batch_size] = found
        return row["fits"]

    if not where.chip:
        raise UserError(f"--find-batch needs a TPU or GPU by its name, such as v5e:4x4 or h100:8, not {where.name}")
    shape = build(config, where, devices).mesh.shape  # what is wrong with the config itself is said at once
    parts, groups = config.accumulate, config.bn_groups
    every = math.lcm(shape["data"] * shape["fsdp"] * parts, parts * groups)
    best = search.largest(fits, max(every, config.batch_size // every * every), every)
    if not best:
        raise UserError(
            f"--topology {where.name}: not even batch_size={tried[-1]['batch_size']} fits: {tried[-1]['reason']}",
            exit_code=RUN_FAILED,
        )
    return {**results[best], "search": tried}
