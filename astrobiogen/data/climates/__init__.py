"""Climate fields as cubes."""
