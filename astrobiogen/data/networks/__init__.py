"""Metabolic networks as arrays and graphs."""
