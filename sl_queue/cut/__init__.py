"""The cut layer: everything that crosses between parties, checked and packed."""
