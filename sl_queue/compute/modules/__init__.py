"""A user's module: its complete state, read, saved and put back."""
