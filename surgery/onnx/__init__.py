"""ONNX: the graph exported once, the weights as its payload, both checked against torch, and the latency measured."""
