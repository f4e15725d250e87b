"""Configurations, one file per experiment, each with `get_config(arg)`; `common` holds shared parts."""
