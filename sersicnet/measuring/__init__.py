"""Measuring: from an image to a catalogue."""
