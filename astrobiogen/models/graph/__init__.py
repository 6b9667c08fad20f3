"""Metabolic networks: attention along edges, the variational autoencoder, what chemistry demands."""
