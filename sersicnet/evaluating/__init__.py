"""Truth against measurement."""
