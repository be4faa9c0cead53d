"""Part `resume`: compare killed and resumed runs of the quickstart's config with an uninterrupted one, bit for bit."""

import concurrent.futures
import os
import re
import signal
import subprocess

import jax
import numpy as np

from qbheat_jax import pytree
from qbheat_jax.tools.gpu_check import TINY_ENCODER, kill_after
from qbheat_jax.tools.gpu_check.job import losses
from qbheat_jax.train.checkpoint import Checkpoints

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def run(job):
    """Run the command line in child processes and compare their last parameters.

    The job "deterministic" sets `DETERMINISTIC` in XLA_FLAGS; the job "plain" does not.
    """
    jax.config.update("jax_platforms", "cpu")  # this process only reads checkpoints
    plain, kills = kill_after.command(job.sizes), kill_after.command(job.sizes, job.sizes.resume_killed)
    environment = dict(os.environ)
    if job.name == "deterministic":
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip()
    job.save(doing="running", XLA_FLAGS=environment.get("XLA_FLAGS", ""))

    def start(name, compiled, how):
        """Run one process on the workdir `name` with the compilation cache `compiled`. Return (exit code, log)."""
        where = {**environment, "JAX_COMPILATION_CACHE_DIR": str(job.folder / f"compiled_{compiled}")}
        command = [*how, *_arguments(job.sizes, job.folder / name)]
        got = subprocess.run(command, env=where, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        (job.folder / f"{name}.log").open("a").write(got.stderr)
        return got.returncode, got.stderr

    def again(name, compiled):
        """Kill and resume a run. Return {"resumed_at": step} or {"problem": text}."""
        code, log = start(name, compiled, kills)
        if code != -signal.SIGKILL:
            return {"problem": f"it should have been killed, but ended with exit code {code}: {_last(log)}"}
        code, log = start(name, compiled, plain)
        resumed = re.search(r"resuming .* at step (\d+)", log)
        if code or not resumed:
            return {"problem": f"it did not resume; exit code {code}: {_last(log)}"}
        return {"resumed_at": int(resumed[1])}

    # The first uses the compiled programs of the uninterrupted run; the second compiles its own, like another machine.
    own = {"same program": "whole", "compiled anew": "again"}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        whole = pool.submit(start, "whole", "whole", plain)

        def one(name):
            if own[name] == "whole":
                whole.result()
            return again(name.replace(" ", "_"), own[name])

        futures = {pool.submit(one, name): name for name in job.sizes.resume_again}
        code, log = whole.result()
        if code:
            job.result["problems"].append(f"the uninterrupted run ended with exit code {code}: {_last(log)}")
        runs = {}
        for future in concurrent.futures.as_completed(futures):
            name, found = futures[future], future.result()
            runs[name] = found
            if "problem" not in found and not code:
                found |= differences(job.folder / "whole", job.folder / name.replace(" ", "_"))
            if "problem" in found:
                job.result["problems"].append(f"{name}: {found['problem']}")
            job.save(runs=runs)
    # Only deterministic operations with the same compiled program must agree bit for bit. The rest is reported.
    strict = runs.get("same program", {})
    if (job.name == "deterministic" or job.sizes.tiny) and strict.get("bitwise") is False:
        job.result["problems"].append(f"not bit for bit: the relative difference is up to {strict['largest']:.1e}")


def _arguments(sizes, workdir):
    """Return the arguments of a run of `photos` with device-cached images, which needs no tensorflow."""
    fields = {
        "data.device_cache": True, "data.eval_split": "", "batch_size": sizes.resume_batch, "total_steps": sizes.resume_steps,
        "checkpoint_every": sizes.resume_every, "log_every": sizes.resume_every, "keep": 9,
    }  # fmt: skip
    if sizes.tiny:
        fields |= {"encoder.name": TINY_ENCODER, "decoder.width": 32, "decoder.depth": 0, "hog": 0.0}
    overrides = [item for name, value in fields.items() for item in (f"--config.{name}", str(value))]
    return ["pretrain", "--config", "configs/photos.py", "--workdir", str(workdir), *overrides]


def differences(one, other):
    """Compare the last checkpoints of two workdirs.

    Args:
      one: Workdir of a run.
      other: Workdir of another run.

    Returns:
      {"bitwise", "largest", "loss", "other_loss"}, or {"problem"} if their steps differ. "largest" is the largest difference
      in a leaf relative to the leaf's largest number, over all leaves.
    """
    (step, a), (other_step, b) = (Checkpoints(workdir).restore_variables() for workdir in (one, other))
    if step != other_step:
        return {"problem": f"it ended at step {other_step} instead of {step}"}
    pairs = [(np.asarray(x), np.asarray(y)) for (_, x), (_, y) in zip(pytree.names(a), pytree.names(b), strict=True)]
    scaled = [np.abs(x - y).max() / max(np.abs(x).max(), 1e-30) for x, y in pairs]
    ends = [losses(workdir)[-1] for workdir in (one, other)]
    return {
        "bitwise": all(x.tobytes() == y.tobytes() for x, y in pairs),
        "largest": float(max(scaled)),
        "loss": ends[0],
        "other_loss": ends[1],
    }


def _last(log):
    return (log.strip().splitlines() or ["no output"])[-1][:300]
