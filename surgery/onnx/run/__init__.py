"""Runs graphs in ONNX Runtime, and makes their inputs."""
