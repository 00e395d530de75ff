"""The command `sl-queue`."""
