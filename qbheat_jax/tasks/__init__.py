"""One file a command: pre-train, fine-tune, probe, detect, classify."""
