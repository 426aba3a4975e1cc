"""Streaming metrics by name, function, or object of clu or metrax."""

__all__: list[str] = []
