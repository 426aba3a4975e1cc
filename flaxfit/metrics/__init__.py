"""Streaming metrics by name, function or object of clu and metrax."""
