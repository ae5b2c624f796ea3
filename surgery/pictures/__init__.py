"""Draws measurements as self-contained SVG and HTML. This package is pure: data in, text out."""
