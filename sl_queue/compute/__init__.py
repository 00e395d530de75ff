"""Stages over torch."""
