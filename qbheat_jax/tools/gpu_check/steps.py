"""Part `steps`: measure the time, MFU, memory and longest kernels of QB-Heat's train step with one encoder."""

import math
import statistics

import jax

from qbheat_jax.tools.bench import timing
from qbheat_jax.tools.gpu_check import build
from qbheat_jax.tools.preflight import chips, matmul_flops
from qbheat_jax.train import config_tables, profile

SHOWN = 20


def run(job):
    """Compile the step, then trace and time it."""
    sizes, batch = job.sizes, dict(job.sizes.batches)[job.name]
    fields = {
        "objective": "qbheat", "encoder.name": job.name, "image_size": sizes.step_pixels, "batch_size": batch,
        "dtype": sizes.dtype, "total_steps": 1_000_000,
    }  # fmt: skip
    if sizes.tiny:
        fields |= {"decoder.width": 32, "decoder.depth": 1}
    config = config_tables.resolve(fields)
    job.save(doing="compiling the step")
    step = build.step(config)
    counts = matmul_flops.by_type(step.traced.jaxpr)
    job.save(
        doing="timing",
        batch=batch,
        pixels=sizes.step_pixels,
        dtype=sizes.dtype,
        trace_seconds=step.seconds["trace"],
        compile_seconds=step.seconds["compile"],
        flops_by_type=counts,
        gflops_per_image=sum(counts.values()) / batch / 1e9,
    )
    with job.turn():
        step.send()
        loss = step.wait()
        if not math.isfinite(loss):
            job.result["problems"].append(f"the loss is {loss}")
        candidate = timing.Candidate(job.name, build.sent(step.send, step.wait))
        seconds = timing.alternate([candidate], sizes.rounds, sizes.seconds)[job.name]["seconds"]
        best = statistics.median(seconds)
        job.save(
            milliseconds=[1e3 * s for s in seconds],
            images_per_second=batch / best,
            mfu=mfu(sum(counts.values()), best),
            peak_bytes=(jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
        )
        with profile.trace(str(job.folder / "trace")):
            for _ in range(sizes.traced):
                step.send()
            step.wait()
    found = profile.longest(job.folder / "trace", sizes.traced)
    if not found["devices"] and not sizes.tiny:
        job.result["problems"].append("the trace holds no device: jax cannot use CUPTI on this machine")
    job.save(**{**found, "kernels": found["kernels"][:SHOWN]})


def mfu(flops, seconds):
    """Return the model FLOPs utilisation of the first device.

    Args:
      flops: Model FLOPs of a step.
      seconds: Time of the step.

    Returns:
      Fraction of the bfloat16 peak, or None for a device of unknown peak.
    """
    kind = jax.devices()[0].device_kind.lower()
    peak = next((chip.flops for name, chip in chips.CHIPS.items() if name in kind.split("-")[0].split()), None)
    return flops / seconds / peak if peak else None
