"""Graphs that other exporters wrote: which tensor of theirs is which weight."""
