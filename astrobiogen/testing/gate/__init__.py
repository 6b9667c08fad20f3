"""Parts of the ahead-of-time compile gate, `astrobiogen.testing.compile_gate`."""
