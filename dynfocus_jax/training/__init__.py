"""Training: optimizer, loss, step, checkpoints, metrics, and the loop that runs a stage."""
