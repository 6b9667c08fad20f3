"""What makes and shows data sets: build, check, describe, export, fetch, make-climate. It stands above
`astrobiogen.data`, which reads what it makes; no kernel, layer, model or trainer imports it. Its subcommands need the
packages of `astrobiogen[data]`.
"""
