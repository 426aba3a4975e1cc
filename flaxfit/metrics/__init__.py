"""Streaming metrics by name, function or object of clu and metrax."""

__all__: list[str] = []
