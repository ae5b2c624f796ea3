"""export-onnx, and new weights for graphs that exist."""
