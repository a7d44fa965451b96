"""Mutated checkpoints and what becomes of them: see scripts/fuzz.py."""
