"""What this machine can do: doctor, benchmarks, disk rate, and the demo."""
