"""Runs graphs with ONNX Runtime, and makes their inputs."""
