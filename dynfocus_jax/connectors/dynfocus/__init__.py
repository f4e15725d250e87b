"""DynFocus (CVPR 2025): event prototypes choose important frames (cones), all others are sketched (rods)."""

from dynfocus_jax.connectors.dynfocus.connector import DynFocusConnector

CONNECTOR = DynFocusConnector
