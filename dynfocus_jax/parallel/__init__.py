"""Several processes and devices: start-up, the device mesh, and the sharding of arrays on it."""
