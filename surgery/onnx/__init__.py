"""ONNX: graphs exported once, or taken from others, with weights as their payload; checked, compared and timed."""
