"""export-onnx, and reweigh: new weights for existing graphs."""
