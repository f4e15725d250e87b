"""Connectors: the methods that turn frame features into language tokens, one file each."""
