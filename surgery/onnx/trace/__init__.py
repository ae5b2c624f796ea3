"""Graphs from torch modules, made without weights."""
