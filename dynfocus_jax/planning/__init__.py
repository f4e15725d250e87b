"""Planning: memory, work and best-case time of a configuration on a machine that is not available."""
