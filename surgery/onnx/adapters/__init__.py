"""Adapters as nodes of a graph."""
