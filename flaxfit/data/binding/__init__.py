"""Binds fields of raw batches to a model's inputs, targets and weights."""
