"""Optimizers by name, function or optax transformation."""
