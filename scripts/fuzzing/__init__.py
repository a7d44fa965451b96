"""Mutated checkpoints and their outcomes: see scripts/fuzz.py."""
