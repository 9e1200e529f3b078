"""Paths, files read within bounds and written whole, and the Hub."""
