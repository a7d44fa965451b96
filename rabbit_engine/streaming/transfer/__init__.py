"""Moves units from disk or host memory into a ring on the device."""
