#!/usr/bin/env bash
# Fault-injection campaign: tests that training survives faults and that commands reject bad input with a one-line error.
# It takes about 100 minutes on two cores and prints a table. Exit code 1 means that at least one try failed.
#
#   bash launch/campaign.sh [--minutes N] [--kills N] [--terms N] [--inputs N] [PART ...]
#
# PART (default: all of them, in this order):
#   inputs   250 malformed images, folders, annotations, weights, checkpoints, configs and command lines
#   devices  a run that is killed and resumed with 8, 4, 1 and 8 virtual devices
#   disks    12 runs on a disk that fills up or becomes read-only (needs root and mount; skipped without them)
#   damage   each file of the newest checkpoint, metrics.jsonl and config.json truncated, bit-flipped, emptied or removed
#   kills    100 SIGKILLs and 20 SIGTERMs at random moments, in runs of one and of two processes
#   soak     one long run, whose memory must stay flat
#
# Each part has a share of the minutes and stops when it is used up. `--help` explains the flags.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
use_venv test
exec python -m tests.campaign "$@"
