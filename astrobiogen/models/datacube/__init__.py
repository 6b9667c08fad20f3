"""Climate datacubes: the encoder, what it predicts, and the physics that it is held to."""
