"""Trains a Flux to carry one token sequence into another: `python -m training.sequences CONFIG`."""
