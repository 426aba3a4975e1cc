"""What is compiled: steps, the one `jax.jit` file, chunks and placement."""
