"""Graphs and payloads on disk."""
