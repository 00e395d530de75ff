"""Leakage through the cut layer, measured; defences that hold; and what they are worth in epsilon."""
