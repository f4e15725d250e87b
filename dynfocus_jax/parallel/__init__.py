"""Devices: the mesh, and how batches and state are laid out on it."""
