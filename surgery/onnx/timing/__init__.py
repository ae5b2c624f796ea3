"""Latency: measured, judged and recorded."""
