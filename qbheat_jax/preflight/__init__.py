"""Preflight: a config's real train step, compiled by the target's own compiler before a chip is rented."""

import importlib.metadata
import json
import logging
import math

from etils import epath

from qbheat_jax import config as config_lib
from qbheat_jax import flops
from qbheat_jax.errors import RUN_FAILED, UserError
from qbheat_jax.preflight import advice, bounds, compile, hlo, products, search, topology

log = logging.getLogger("qbheat")


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
        try:
            save = epath.Path(save)
            save.parent.mkdir(parents=True, exist_ok=True)
            save.write_text(json.dumps(result, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"{save} cannot be written: {error.strerror}", exit_code=RUN_FAILED) from error
    return result


def check(config, where, devices, name="config"):
    """All that is found out about one config -> dict of plain numbers and words; what is not known is None.

    Bytes and seconds are of one device and one step, FLOPs of the whole batch. Raises UserError where config and
    topology do not go together.
    """
    step = build(config, where, devices)
    log.info("%d parameters; tracing the step", step.parameters)
    traced = step.trace()
    plain = _without_recomputing(step, traced, where, devices)
    by_type = products.by_type(plain.jaxpr)
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
        **dict.fromkeys(("fits", "reason", "compile_seconds", "compiler", "memory")),
        **dict.fromkeys(("bytes_accessed", "bytes_padding", "bytes_counted", "bytes_by_part", "collectives")),
        **dict.fromkeys(("floors", "bounds")),
        "not_known": _NOT_KNOWN.get(where.kind, "" if where.tpu else _NOT_KNOWN["gpu"]),
        "warnings": advice.of_step(step, traced, by_type, where),
    }
    figures, module = {"arithmetic": product_flops / len(devices)}, None
    if where.tpu or where.kind == "cpu":
        module = _compile(result, traced, where, len(devices))
    if where.tpu and module:
        figures["bytes_accessed"] = result["bytes_accessed"]
        figures["sent"] = sum(c["sent"] for c in result["collectives"].values())
    if where.chip and result["fits"] is not False:
        result["floors"] = bounds.floors(where.chip, **figures)
        result["bounds"] = bounds.upper(result["floors"], config.batch_size / where.chips)
    if module:
        result["warnings"] += advice.of_program(module, result["floors"] or {})
    return result


_NOT_KNOWN = {
    "cpu": "what this machine's memory and arithmetic allow",
    "gpu": "a GPU's compiler runs on a GPU alone, so neither whether it fits nor bytes and collectives",
}


def _compile(result, traced, where, devices):
    """Compiles and adds what is found to the result -> the program's hlo.Module, None where it was refused."""
    log.info("compiling for %s, which takes minutes for a large model", where.name)
    done = compile.compile(traced)
    result["compile_seconds"], result["compiler"] = done.seconds, _compiler(where)
    result["fits"], result["reason"] = (done.program is not None) if where.tpu else None, done.reason
    if done.program is None:
        return None
    result["memory"] = compile.memory(done.program)
    module = hlo.Module(done.program.as_text(), devices)
    result["collectives"] = {
        kind: {"count": c.count, "bytes": c.bytes, "sent": round(c.sent)} for kind, c in module.collectives().items()
    }
    if where.tpu:
        moved, padding = module.traffic()
        result["bytes_accessed"], result["bytes_padding"] = moved - padding, padding
        result["bytes_by_part"] = module.traffic_by_part()
        result["bytes_counted"] = "counted on the compiled HLO, loops as often as they run"
    return module


def _compiler(where):
    package = "libtpu" if where.tpu else "jaxlib"
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:  # TPU_LIBRARY_PATH names one that pip knows nothing of
        return package


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
    if step.config.remat == "none" and not where.tpu:
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
        except UserError as error:
            row = {"batch_size": batch_size, "fits": False, "reason": str(error), "compile_seconds": 0.0}
        log.info("batch %d: %s (%.0f s)", batch_size, row["reason"] or "fits", row["compile_seconds"])
        tried.append(row)
        if row["fits"]:
            results[batch_size] = found
        return row["fits"]

    if not where.tpu:
        raise UserError(f"--find-batch asks a TPU's compiler, and --topology is {where.name}: take one such as v5e:4x4")
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
