"""A data set on disk: packed arrays, the manifest, what may be read, and how little of it at a time."""
