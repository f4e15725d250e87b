"""Training: optimizer, loss, step, checkpoints, metrics and the one loop that runs a stage."""
