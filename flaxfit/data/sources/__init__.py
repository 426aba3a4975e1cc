"""Sources of fixed-shape batches: in memory and streamed."""
