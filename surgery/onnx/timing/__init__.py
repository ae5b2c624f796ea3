"""Measures, judges and records latency."""
