#!/usr/bin/env bash
# Runs the tests, in .venv, from any directory. Arguments go to pytest: `bash launch/test.sh tests/test_heat.py -k exp`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
use_venv test
# Two workers on two cores halve the time, which is mostly compilation; neighbours stay together, and share what they made.
exec python -m pytest -n 2 --dist worksteal "$@"
