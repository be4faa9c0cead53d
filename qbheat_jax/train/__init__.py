"""The training loop, its state, checkpoints, optimizer, sharding and processes."""
