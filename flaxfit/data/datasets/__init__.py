"""Datasets of examples and streams of raw batches, before any model is known."""
