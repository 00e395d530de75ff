"""A private broker, faults and their report: for tests and `sl-queue chaos`."""
