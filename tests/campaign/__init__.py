"""Fault-injection campaign: kills, full disks, damaged files, malformed inputs and a long run.

pytest does not collect it. `bash launch/campaign.sh` runs it, prints a table, and fails if any try failed.
"""
