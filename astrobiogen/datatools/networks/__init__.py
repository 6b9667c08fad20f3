"""Metabolic networks: SBML and JSON in, typed graphs with their encodings and growth out."""
