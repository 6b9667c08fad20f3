"""The parts of `astrobiogen.testing.fuzz`."""
