"""Tables of galaxies: written, read, matched, scored and shown."""
