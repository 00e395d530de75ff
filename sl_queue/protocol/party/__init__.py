"""One party's memory of a run."""
