"""The loops: one file per role, on protocol and ports only."""
