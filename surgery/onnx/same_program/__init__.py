"""Decides whether two graphs are the same program, and counts what each costs."""
