"""Builders: raw files (netCDF, SBML, tables, text) to the packed dataset. Needs the optional packages of
``astrobiogen[data]``.
"""
