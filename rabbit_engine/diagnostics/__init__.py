"""Measures this machine: doctor, benchmarks, disk rate, and the demo."""
