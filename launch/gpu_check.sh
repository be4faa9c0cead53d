#!/usr/bin/env bash
# Check a machine with an NVIDIA GPU in at most seven minutes: correct values, bit-for-bit resumption, and the speed of train
# steps, also against PyTorch. docs/gpus.md describes each part.
#
#   bash launch/gpu_check.sh [PART ...] [--out DIR] [--limit SECONDS] [--jobs N] [--tiny]
#
# PART: values, resume, objectives, steps or peers (default: all). The script writes result.json and result.md to DIR (default:
# runs/gpu_check) after each job. --tiny tests the script itself on a CPU. It runs from the checkout with $PYTHON, else
# .venv/bin/python, else python3. TensorFlow is not needed.
# Exit code: 0 all passed, 1 a part did not pass, 2 the check cannot run on this machine.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-}
if [ -z "$python" ]; then
  if [ -x .venv/bin/python ]; then python=.venv/bin/python; else python=python3; fi
fi
if ! command -v "$python" >/dev/null; then
  echo "gpu_check: error: PYTHON=$python was not found; set PYTHON to a Python interpreter" >&2
  exit 2
fi
missing=$("$python" -c '
from importlib.util import find_spec
needed = "jax flax optax orbax etils ml_collections ml_dtypes numpy PIL safetensors tqdm skimage sklearn".split()
print(*(name for name in needed if find_spec(name) is None))
')
if [ -n "$missing" ]; then
  echo "gpu_check: error: $python lacks these modules: $missing; install them, or unpack their wheels into a PYTHONPATH folder" >&2
  exit 2
fi
exec "$python" -m qbheat_jax.tools.gpu_check "$@"
