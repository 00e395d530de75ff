"""A whole run on one machine: as threads, or as supervised processes over a broker."""
