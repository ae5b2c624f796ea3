"""Puts adapters into a graph as nodes."""
