"""Structural parameters of galaxies from images, by convolutional networks."""

__version__ = "0.1.0"
