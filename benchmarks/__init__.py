"""How fast it is, against the alternatives: `python -m benchmarks NAME`."""
