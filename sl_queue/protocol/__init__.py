"""Pure: no torch, pika, clock, thread or file in here."""
