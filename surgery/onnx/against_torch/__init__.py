"""Compares graphs with the torch modules from which they were made."""
