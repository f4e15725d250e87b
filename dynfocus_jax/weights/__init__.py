"""Published checkpoints in and out: reading files, the table of every family, strict merge, export."""
