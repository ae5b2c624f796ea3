"""Differences of weights and their truncated decompositions. Knows no path, no plan and no method."""
