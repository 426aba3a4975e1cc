"""Run directories: session, checkpoints, resume and trainer metadata."""
