"""Reads and writes graphs and their payloads."""
