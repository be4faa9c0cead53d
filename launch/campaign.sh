#!/usr/bin/env bash
# What the world does to a run: 120 kills, full disks and torn files, 250 malformed inputs, a soak. It takes about 100 minutes
# on two cores, prints a table, and fails on one miss.
#
#   bash launch/campaign.sh [--minutes N] [inputs|devices|disks|damage|kills|soak ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
use_venv test
exec python -m tests.campaign "$@"
