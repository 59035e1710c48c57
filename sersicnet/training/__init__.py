"""The river from a dataset to weights."""
