"""`build`: raw climates, networks, spectra and texts to one packed data set."""
