"""Splitting of a whole module into base models and a fuse model, proved bit by bit."""
