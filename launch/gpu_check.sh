#!/usr/bin/env bash
# Checks a machine with an NVIDIA GPU in at most seven minutes: are values right, do runs resume bit for bit, how fast are the
# train steps, and beside PyTorch. docs/gpus.md says what each part answers.
#
#   bash launch/gpu_check.sh [PART ...] [--out DIR] [--limit SECONDS] [--jobs N] [--tiny]
#
# PART: values, resume, objectives, steps, peers; all without one. DIR (runs/gpu_check) gets result.json and result.md, which
# are written again as each job ends. --tiny tries the program itself, on a CPU. It runs from the checkout, with $PYTHON, else
# .venv/bin/python where there is one, else python3; TensorFlow is not needed. Exit code: 0 all passed, 1 something did not, 2 it
# cannot be run here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-}
if [ -z "$python" ]; then
  if [ -x .venv/bin/python ]; then python=.venv/bin/python; else python=python3; fi
fi
if ! command -v "$python" >/dev/null; then
  echo "gpu_check: error: there is no $python" >&2
  exit 2
fi
missing=$("$python" -c '
from importlib.util import find_spec
needed = "jax flax optax orbax etils ml_collections ml_dtypes numpy PIL safetensors tqdm skimage sklearn".split()
print(*(name for name in needed if find_spec(name) is None))
')
if [ -n "$missing" ]; then
  echo "gpu_check: error: $python lacks the modules $missing: install them, or unpack their wheels into a folder on PYTHONPATH" >&2
  exit 2
fi
exec "$python" -m qbheat_jax.tools.gpu_check "$@"
