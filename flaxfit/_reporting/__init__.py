"""Progress, timing and history: numbers for people."""
