"""The river from an image to a catalogue."""
