"""Sinks of a worker's events and status: log, Prometheus, console."""
