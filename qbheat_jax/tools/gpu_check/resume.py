"""`resume`: runs of the quickstart's config that are killed and resumed, beside one that is not. Bit for bit?"""

import concurrent.futures
import os
import re
import signal
import subprocess

import jax
import numpy as np

from qbheat_jax import pytree
from qbheat_jax.tools.gpu_check import TINY_ENCODER, killed
from qbheat_jax.tools.gpu_check.job import losses
from qbheat_jax.train.checkpoint import Checkpoints

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def run(job):
    """Run the command line in processes of its own, with or without the flag, and compare the last parameters."""
    jax.config.update("jax_platforms", "cpu")  # here checkpoints are only read
    plain, kills = killed.command(job.sizes), killed.command(job.sizes, job.sizes.resume_killed)
    environment = dict(os.environ)
    if job.name == "deterministic":
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip()
    job.save(doing="running", XLA_FLAGS=environment.get("XLA_FLAGS", ""))

    def start(name, compiled, how):
        """One process on the workdir `name`, with the compiled programs of `compiled` -> (exit code, log)."""
        where = {**environment, "JAX_COMPILATION_CACHE_DIR": str(job.folder / f"compiled_{compiled}")}
        command = [*how, *_arguments(job.sizes, job.folder / name)]
        got = subprocess.run(command, env=where, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        (job.folder / f"{name}.log").open("a").write(got.stderr)
        return got.returncode, got.stderr

    def again(name, compiled):
        """A run that is killed and resumed -> {"resumed_at": step}, or "problem"."""
        code, log = start(name, compiled, kills)
        if code != -signal.SIGKILL:
            return {"problem": f"it was to be killed, and ended with exit code {code}: {_last(log)}"}
        code, log = start(name, compiled, plain)
        resumed = re.search(r"resuming .* at step (\d+)", log)
        if code or not resumed:
            return {"problem": f"it did not resume, exit code {code}: {_last(log)}"}
        return {"resumed_at": int(resumed[1])}

    # One has the programs of the run it is compared with; one compiles them itself, meanwhile, as another machine would.
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
            job.result["problems"].append(f"the run that is not killed ends with exit code {code}: {_last(log)}")
        runs = {}
        for future in concurrent.futures.as_completed(futures):
            name, found = futures[future], future.result()
            runs[name] = found
            if "problem" not in found and not code:
                found |= differences(job.folder / "whole", job.folder / name.replace(" ", "_"))
            if "problem" in found:
                job.result["problems"].append(f"{name}: {found['problem']}")
            job.save(runs=runs)
    # What is promised: with the flag, by the program that was compiled once. What else holds is reported.
    promised = runs.get("same program", {})
    if (job.name == "deterministic" or job.sizes.tiny) and promised.get("bitwise") is False:
        job.result["problems"].append(f"not bit for bit: they differ by up to {promised['largest']:.1e} of their size")


def _arguments(sizes, workdir):
    """Of a run of `photos`, whose images are on the device, so that tensorflow is not needed."""
    fields = {
        "data.device_cache": True, "data.eval_split": "", "batch_size": sizes.resume_batch, "total_steps": sizes.resume_steps,
        "checkpoint_every": sizes.resume_every, "log_every": sizes.resume_every, "keep": 9,
    }  # fmt: skip
    if sizes.tiny:
        fields |= {"encoder.name": TINY_ENCODER, "decoder.width": 32, "decoder.depth": 0, "hog": 0.0}
    overrides = [item for name, value in fields.items() for item in (f"--config.{name}", str(value))]
    return ["pretrain", "--config", "configs/photos.py", "--workdir", str(workdir), *overrides]


def differences(one, other):
    """Between the last checkpoints of two workdirs -> {"bitwise", "largest", "loss", "other_loss"}.

    largest: of all leaves, the largest difference over the leaf's largest number.
    """
    (step, a), (other_step, b) = (Checkpoints(workdir).restore_variables() for workdir in (one, other))
    if step != other_step:
        return {"problem": f"it ends at step {other_step}, not {step}"}
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
    return (log.strip().splitlines() or ["no word"])[-1][:300]
