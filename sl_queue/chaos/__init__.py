"""Faults on purpose, and what they changed: nothing."""
