"""Deployed programs: one thin entry point per role."""
