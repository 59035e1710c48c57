"""The river from a prior and a telescope to stamps with their truth."""
