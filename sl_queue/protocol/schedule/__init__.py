"""The order of work and of rows."""
