"""Preflight: compile a config's train step for a TPU or GPU topology ahead of time, and report memory and cost."""

import functools
import json
import logging
import math

from etils import epath

from qbheat_jax import config as config_lib
from qbheat_jax.errors import RUN_FAILED, UserError, writing
from qbheat_jax.tools.preflight import bounds, compile, hlo, matmul_flops, process, search, topology, warnings
from qbheat_jax.tools.preflight.chips import NODE
from qbheat_jax.train import flops
from qbheat_jax.train.config_tables import PRETRAIN

log = logging.getLogger("qbheat")

GIB = 2**30
# Fractions of a GPU's memory: jax's default preallocation without XLA_PYTHON_CLIENT_MEM_FRACTION, and the most that jax can
# have. CUDA, NCCL and cuDNN need the rest.
PREALLOCATED, LARGEST = 0.75, 0.95


def run(path, overrides, topology_name, *, find_batch=False, inference=False, save=None):
    """Check a config file on a topology.

    Args:
      path: Path of a pre-training config.
      overrides: [(key, text), ...] from the command line.
      topology_name: Name of a topology, such as "v5e:4x4".
      find_batch: Search for the largest batch that fits.
      inference: Compile the forward pass on whole images instead of the train step: logits, or features without a classifier.
      save: Path of a JSON file for the result, or None.

    Returns:
      The dict of `check`. With `find_batch` it belongs to the largest batch, and its list "search" has all batches tried.

    Raises:
      UserError: Config and topology do not fit each other (raised before compilation), no batch fits, or `save` cannot be
        written.
    """
    target = topology.parse(topology_name)
    config = config_lib.load(path, overrides, PRETRAIN)
    topology.prepare(target)
    devices = topology.devices(target)
    name = epath.Path(path).name
    checked = functools.partial(check, target=target, devices=devices, name=name, inference=inference)
    result = _search(config, target, devices, checked) if find_batch else checked(config)
    if save:
        with writing(save, RUN_FAILED):
            save = epath.Path(save)
            save.parent.mkdir(parents=True, exist_ok=True)
            save.write_text(json.dumps(result, indent=2) + "\n")
    return result


def check(config, target, devices, name="config", inference=False):
    """Compile the step of one config, or its forward pass, and report its memory and cost.

    Args:
      config: A checked pre-training config.
      target: A `topology.Topology`.
      devices: Devices of `topology.devices`.
      name: Name of the config in the report.
      inference: As of `run`. A step is then a forward pass.

    Returns:
      Dict of numbers and strings, None where unknown. Bytes and seconds are per device and step; FLOPs are per step of the
      whole batch.

    Raises:
      UserError: Config and topology do not fit each other.
    """
    step = build(config, target, devices, inference)
    if not target.gpu:
        return _check(step, target, devices, name, compile.compile)
    with process.Compilation(config, target, inference) as running:  # compiles while this process traces and counts
        return _check(step, target, devices, name, lambda _: running.result())


def _check(step, target, devices, name, compiler):
    """Return the result of `check` for a step. `compiler` maps the traced step to a `compile.Compiled`."""
    config = step.config
    log.info("%d parameters; tracing the step", step.parameters)
    traced = _trace(step, target)
    plain = _without_recomputing(step, traced, target, devices)
    flops_by_type = matmul_flops.by_type(plain.jaxpr)
    total_matmul_flops = sum(flops_by_type.values())
    result = {
        "config": name,
        "program": "forward pass" if step.inference else "train step",
        "topology": target.name,
        "chips": target.chips,
        "devices": len(devices),
        "mesh": dict(step.mesh.shape),
        "batch_size": config.batch_size,
        "images_per_device": config.batch_size // (step.mesh.shape["data"] * step.mesh.shape["fsdp"]),
        "parameters": step.parameters,
        "state_bytes": step.state_bytes(),
        "argument_bytes": step.argument_bytes(),
        "least_bytes": step.min_traffic_bytes(),
        "hbm_bytes": _hbm(target),
        "product_flops": total_matmul_flops,
        "product_flops_by_type": flops_by_type,
        "flops": flops.count(plain.jaxpr),
        **dict.fromkeys(("fits", "reason", "error", "compile_seconds", "compiler", "memory", "needed_bytes")),
        **dict.fromkeys(
            ("bytes_accessed", "bytes_padding", "bytes_counted", "bytes_by_part", "collectives", "launches")
        ),
        **dict.fromkeys(("floors", "bounds")),
        "not_known": _not_known(target),
        "warnings": warnings.of_step(step, traced, flops_by_type, target),
    }
    figures, module = {"arithmetic": total_matmul_flops / len(devices)}, None
    if target.chip or target.kind == "cpu":
        module = _compile(result, traced, target, len(devices), compiler)
    if target.chip and module:
        figures["bytes_accessed"] = result["bytes_accessed"]
        figures["sent"] = sum(c["sent"] for c in result["collectives"].values())
    if target.chip and result["fits"] is not False and not result["error"]:
        result["floors"] = bounds.floors(target.chip, **figures)
        result["bounds"] = bounds.upper(result["floors"], config.batch_size / target.chips)
    if module:
        result["warnings"] += warnings.of_program(module, result["floors"] or {}, target, result["mesh"])
    return result


def _trace(step, target):
    try:
        return step.trace()
    except RuntimeError as error:  # tracing cuDNN's attention looks up cuDNN's version
        remedy = process.remedy(str(error))
        if not remedy:
            raise
        raise UserError(f"--topology {target.name}: {error}{remedy}", exit_code=RUN_FAILED) from error


def _not_known(target):
    """Return a phrase that names what the result lacks on this kind of topology, or ""."""
    if target.kind == "cpu":
        return "the memory and speed of this machine's CPU"
    if target.gpu:
        words = (
            "run time, since nothing was run. XLA chose algorithms without timing them; on a GPU it may choose others, "
            "with other kernels, scratch memory and bytes"
        )
        nodes = ". NVLink is assumed between all GPUs, but a slower network connects the nodes" * (
            target.devices > NODE
        )
        return words + nodes
    return "" if target.tpu else "the GPU model; use a known one, such as h100:8"


def _compile(result, traced, target, devices, compiler):
    """Compile the step and add the findings to `result`. Return the program's `hlo.Module`, or None without a program."""
    log.info("compiling for %s; a large model takes minutes", target.name)
    done = compiler(traced)
    result["compile_seconds"], result["compiler"] = done.seconds, _compiler(target)
    result["fits"], result["reason"], result["error"] = _fits(done, target), done.refusal, done.error
    if done.note:
        result["warnings"].append(done.note)
    if not done.text:
        return None
    result["memory"] = done.memory
    if target.gpu:
        _add_need(result, target)
    module = hlo.Module(done.text, devices)
    result["collectives"] = {
        kind: {"count": c.count, "bytes": c.bytes, "sent": round(c.sent)} for kind, c in module.collectives().items()
    }
    if target.chip:
        moved, padding = module.traffic()
        result["bytes_accessed"], result["bytes_padding"] = moved - padding, padding
        result["bytes_by_part"] = module.traffic_by_part()
        result["bytes_counted"] = "counted on the compiled HLO, loop bodies once per iteration"
    if target.gpu:
        result["bytes_counted"] += ", without L2 cache hits"
        result["launches"] = module.launches()
    return module


def _fits(done, target):
    """Return whether the program fits, by the compiler's verdict; None without a verdict, as for a compiled GPU program."""
    if done.refusal:
        return False
    return True if target.tpu and done.text else None


def _add_need(result, target):
    """Add the memory that a step needs and whether it fits, since XLA also compiles GPU programs that do not fit."""
    m, hbm = result["memory"], target.chip.hbm
    need = m["argument"] + m["output"] - m["alias"] + m["temp"] + m["generated_code"]
    result["needed_bytes"], result["fits"] = need, need <= LARGEST * hbm
    words = f"a step needs {need / GIB:.1f} GiB"
    if not result["fits"]:
        result["reason"] = f"{words}, but jax can use at most {LARGEST * hbm / GIB:.1f} of a GPU's {hbm / GIB:.1f} GiB"
    elif need > PREALLOCATED * hbm:
        result["warnings"].append(
            f"{words}, but by default jax only takes {PREALLOCATED * hbm / GIB:.1f} GiB: set "
            f"XLA_PYTHON_CLIENT_MEM_FRACTION={min(LARGEST, math.ceil(need / hbm * 50 + 1) / 50):.2f}"
        )


def _compiler(target):
    if target.gpu:
        return topology.gpu_compiler()
    package = "libtpu" if target.tpu else "jaxlib"
    return topology.installed(package) or package  # TPU_LIBRARY_PATH may name a libtpu that pip does not know


def _hbm(target):
    return target.chip.hbm // target.chip.devices if target.chip else None


def build(config, target, devices, inference=False):
    """Return the `compile.Step` of a config on a topology. Raise UserError, with the topology's name, if they conflict."""
    try:
        return compile.build(config, devices, _hbm(target) or math.inf, inference=inference)
    except UserError as error:
        raise UserError(f"--topology {target.name}: {error}") from error


def _without_recomputing(step, traced, target, devices):
    """Return the trace on which model FLOPs are counted. It excludes rematerialisation, which is not the model's work."""
    if step.inference or (step.config.remat == "none" and not target.chip):
        return traced
    plain = config_lib.resolve({**config_lib.flatten(step.config.to_dict()), "remat": "none"}, PRETRAIN)
    return compile.build(plain, devices, plain=True).trace()


def _search(config, target, devices, check):
    tried, results = [], {}

    def fits(batch_size):
        changed = {**config_lib.flatten(config.to_dict()), "batch_size": batch_size}
        try:
            found = check(config_lib.resolve(changed, PRETRAIN))
            row = {key: found[key] for key in ("batch_size", "fits", "reason", "compile_seconds")}
            row["reason"] = row["reason"] or found["error"]
        except UserError as error:
            found = None
            row = {"batch_size": batch_size, "fits": False, "reason": str(error), "compile_seconds": 0.0}
        if found and found["error"] and not results:  # a smaller batch is unlikely to help
            raise UserError(f"--topology {target.name}: {found['error']}", exit_code=RUN_FAILED)
        log.info("batch %d: %s (%.0f s)", batch_size, row["reason"] or "fits", row["compile_seconds"])
        tried.append(row)
        if row["fits"]:
            results[batch_size] = found
        return row["fits"]

    if not target.chip:
        raise UserError(
            f"--find-batch needs a named TPU or GPU, such as v5e:4x4 or h100:8, not --topology {target.name}"
        )
    shape = build(config, target, devices).mesh.shape  # raises at once if the config itself is wrong
    parts, groups = config.accumulate, config.bn_groups
    every = math.lcm(shape["data"] * shape["fsdp"] * parts, parts * groups)
    best = search.largest(fits, max(every, config.batch_size // every * every), every)
    if not best:
        raise UserError(
            f"--topology {target.name}: no batch fits, even batch_size={tried[-1]['batch_size']}: {tried[-1]['reason']}",
            exit_code=RUN_FAILED,
        )
    return {**results[best], "search": tried}
