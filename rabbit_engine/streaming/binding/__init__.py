"""Puts units into a model: placeholders, wrapped forwards, blocks of rows, routed experts."""
