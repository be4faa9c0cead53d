"""What the world does to a run, over and over: kills, full disks, torn files, malformed inputs, long hours. Not collected by
pytest: `bash launch/campaign.sh` runs it, prints a table, and fails on one miss."""
