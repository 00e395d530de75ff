"""What the command `sl-queue` does, and what it shows."""
