#!/usr/bin/env bash
# Runs the tests, in .venv, from any directory. Arguments go to pytest: `bash launch/test.sh tests/test_ops_heat.py -k exp`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
use_venv test
# What one test compiles serves the others, those that start processes among them, and the next run.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/.venv/compiled}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.3
# Two workers on two cores halve the time, which is mostly compilation; neighbours stay together, and share what they made.
exec python -m pytest -n 2 --dist worksteal "$@"
