"""Tensors' values in memory: the only room that knows TensorFlow, JAX and torch."""
