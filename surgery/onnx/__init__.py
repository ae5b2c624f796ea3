"""ONNX: graphs that are exported once, or come from other exporters, with weights as their payload. They are checked,
compared and timed."""
