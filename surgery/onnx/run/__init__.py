"""Graphs run by ONNX Runtime, and what they are fed."""
