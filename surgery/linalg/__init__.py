"""Differences of weights, and their truncated decompositions. This package knows no path, no plan and no method."""
