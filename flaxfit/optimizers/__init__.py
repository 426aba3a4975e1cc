"""Optimizers by name, function or optax transformation."""

__all__: list[str] = []
