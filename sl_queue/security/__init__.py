"""Sealing of messages between parties."""
