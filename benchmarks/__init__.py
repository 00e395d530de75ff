"""Benchmarks of speed, against the alternatives: `python -m benchmarks NAME`."""
