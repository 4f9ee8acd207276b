"""A save and a load, from a model to bytes and back."""
