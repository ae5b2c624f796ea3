"""Reads and writes graphs and payloads on disk."""
