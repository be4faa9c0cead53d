"""What this machine has: versions, devices, and which optional parts can be used."""

import importlib.metadata
import platform

import jax

from qbheat_jax import __version__

# What a package is for here; those after the first row are extras.
PACKAGES = {
    "jax": "arrays and compilation", "flax": "modules", "optax": "optimizers", "orbax-checkpoint": "checkpoints",
    "tensorflow": "tfds: sources, the others without data.device_cache, TensorBoard",
    "tensorflow-cpu": "the same, without GPU code",
    "tensorflow-datasets": "tfds: sources", "clu": "TensorBoard", "scikit-image": "the photos source",
    "scikit-learn": "the photos source", "libtpu": "TPUs; preflight of TPUs",
    "jax-cuda13-pjrt": "NVIDIA GPUs; preflight of GPUs", "matplotlib": "report", "jinja2": "report",
}  # fmt: skip


def describe():
    """A text of a dozen lines."""
    lines = [f"qbheat_jax {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    for device in jax.devices():
        lines.append(f"device {device.id}: {device.platform}, {device.device_kind}")
    for package, use in PACKAGES.items():
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        lines.append(f"{package:20} {version:15} {use}")
    return "\n".join(lines)
