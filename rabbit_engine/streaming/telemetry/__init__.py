"""Measurements of moving weights: profile, trace and progress."""
