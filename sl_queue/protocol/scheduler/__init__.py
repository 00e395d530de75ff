"""The scheduler's reducer and its state."""
