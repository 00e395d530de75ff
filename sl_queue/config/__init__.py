"""Configuration, read once: the job that all parties agreed on, one party's file, the environment, user code."""
