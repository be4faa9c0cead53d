#!/usr/bin/env bash
# Checks what needs no test: lint, format, types, examples in docstrings, and the documentation's build.
# It takes about a minute, and stops at the first failure. `bash launch/test.sh` runs the tests.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
use_venv dev

step() {
  echo "check: $*" >&2
  if ! "$@"; then
    echo "check: failed: $*" >&2
    exit 1
  fi
}
step ruff check .
step ruff format --check .
step mypy
JAX_PLATFORMS=cpu step python -m pytest -q -p no:cacheprovider --doctest-modules qbheat_jax
NO_MKDOCS_2_WARNING=1 step mkdocs build --quiet --strict
