"""Graphs from other exporters: finds which tensor of a graph is which weight."""
