"""Binds fields of raw batches to the inputs of a model's call."""
