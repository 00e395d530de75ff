"""What all parties agreed and what one party says of itself, read once: job, party file, environment, user code."""
