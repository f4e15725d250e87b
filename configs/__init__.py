"""One file an experiment, each with `get_config(arg)`; `common` holds what those of published size share."""
