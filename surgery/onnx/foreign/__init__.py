"""Identifies the weights in graphs that other exporters wrote."""
