"""Climates by ExoPlaSim, an external program (GPL-2.0) that this package neither imports nor ships.

It is called in a process of its own, by a script that is written into the work folder; only files come back.
"""
