"""Prediction of a pipeline's speed from measured costs."""
