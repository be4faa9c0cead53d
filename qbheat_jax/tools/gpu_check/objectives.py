"""Part `objectives`: run a few steps of one method on synthetic images, from the command line."""

import subprocess

from qbheat_jax.tools.gpu_check import TINY_ENCODER, kill_after
from qbheat_jax.tools.gpu_check.job import losses

_SMALL = {"total_steps": 3, "log_every": 1, "checkpoint_every": 3, "data.eval_split": ""}
_IMAGES = {"data.source": "synthetic:64", "batch_size": 16}
# {job: (command, config, fields)}. The encoders compile fast.
_RUNS = {
    "moco": ("pretrain", "photos.py", _IMAGES | {"moco.queue": 64, "encoder.name": "mobile_former_tiny"}),
    "simmim": ("pretrain", "photos.py", _IMAGES | {"encoder.name": "resnet18"}),
    "mae": ("pretrain", "photos.py", _IMAGES | {"encoder.name": "vit_ti", "encoder.stride": 8}),
    "dense": ("detect", "detect/scenes.py", {"data.source": "scenes:64"}),
    "detr": ("detect", "detect/scenes.py", {"data.source": "scenes:64", "detr.queries": 32}),
}


def run(job):
    """Run three steps in the dtype of `job.sizes`."""
    command, config, fields = _RUNS[job.name]
    fields = {**_SMALL, **fields, "objective": job.name, "dtype": job.sizes.dtype}
    if job.sizes.tiny:
        fields |= {"encoder.name": TINY_ENCODER, "batch_size": 4, "decoder.width": 32, "hog": 0.0}
    job.save(doing="running")
    workdir = job.folder / "run"
    arguments = [command, "--config", f"configs/{config}", "--workdir", str(workdir)]
    arguments += ["--init", "random"] if command == "detect" else []
    arguments += [item for name, value in fields.items() for item in (f"--config.{name}", str(value))]
    code = subprocess.run([*kill_after.command(job.sizes), *arguments], stdout=subprocess.DEVNULL).returncode
    if code:
        job.result["problems"].append(f"exit code {code}, see its log")
        return
    job.save(losses=losses(workdir))  # the training loop itself fails at a loss that is not finite
