"""Graphs compared with the torch modules that they were made of."""
